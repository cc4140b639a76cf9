"""PairedModel: one pipeline stage of the teacher and of the student, the captures between them, where losses attach.

What travels between stages is [teacher_hidden, student_hidden] side by side; the configuration that megatron-core's
schedules see has hidden_size D + d, so their buffers fit. The teacher runs first, without autograd; forward hooks on
its linear layers keep their outputs until the student's same layer has produced its own, where the clone loss is
attached.

Notation: s sequence, b micro-batch, D teacher hidden, d student hidden, f a linear layer's features; `/tp` split.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_lrc.clone.losses import AttachCloneLoss, inverse_widths
from megatron_lrc.clone.projections import ClonedWeight, Projections, accumulate_in_fp32
from megatron_lrc.clone.sites import CAPTURED_LINEARS, EMBED, LAYER_SITES, LM_HEAD, Site, projection_names, select
from megatron_lrc.clone.vocab_parallel import VocabularyShard, lm_and_kl_loss
from megatron_lrc.config import Config, ModelShape
from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.mcore.models import build_stage, head_layout, layers_of, norm_gains, padded_vocab_size

SITES_OF: dict[str, list[Site]] = {
    linear: [site for site in LAYER_SITES if site.linear == linear] for linear in CAPTURED_LINEARS
}


@dataclass(frozen=True, slots=True)
class Shapes:
    """The two models, and the teacher's RoPE (float32 [head_dim/2]), which the student shares."""

    teacher: ModelShape
    student: ModelShape
    inverse_frequencies: Tensor


class LossSums:
    """Sums over tokens since `reset`, on the device, of what this rank holds: partial sums over the whole world.

    main [3]: LM, KL (with tau^2), tokens, counted on one tensor parallel rank of the last stage.
    clone [layers, sites]: rows of this stage's layers; complete after a sum over all ranks.
    """

    def __init__(self, num_layers: int, device: torch.device):
        self.main = torch.zeros(3, dtype=torch.float64, device=device)
        self.clone = torch.zeros(num_layers, len(LAYER_SITES), dtype=torch.float64, device=device)

    def reset(self) -> None:
        self.main.zero_()
        self.clone.zero_()


class PairedModel(nn.Module):
    """One stage of both models. `projections` generates the student's weights and is what an optimizer trains.

    chunk: which of this rank's virtual stages (0 without interleaving). A stage at an end may have no layers.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: Config, shapes: Shapes, groups: Groups, dtype: torch.dtype, chunk: int = 0):
        super().__init__()
        self.settings, self.shapes, self.groups = config, shapes, groups
        self.pre_process = groups.is_first_rank and chunk == 0
        self.post_process = groups.is_last_rank and chunk == config.num_chunks - 1
        place = {
            "dtype": dtype,
            "chunk": chunk,
            "is_first_stage": self.pre_process,
            "is_last_stage": self.post_process,
        }
        self.teacher = build_stage(config, shapes.teacher, shapes.inverse_frequencies, **place)
        self.student = build_stage(config, shapes.student, shapes.inverse_frequencies, **place)
        self._share_tied_weights()
        # What the schedules read: the student's settings, with room for both hidden states between stages.
        self.config = copy.copy(self.student.config)
        self.config.hidden_size = shapes.teacher.hidden_size + shapes.student.hidden_size
        self.heads = head_layout(shapes.teacher)
        self.sums = LossSums(shapes.teacher.num_layers, groups.device)
        self.vocabulary = VocabularyShard.of(
            shapes.teacher.vocab_size, padded_vocab_size(shapes.teacher.vocab_size, groups.tp.size()), groups.tp
        )
        self.projections = Projections(
            projection_names(
                [index for index, _ in layers_of(self.student)],
                self.pre_process or self._has_tied_head(),
                self._has_own_head(),
            ),
            norm_gains(self.student),
            teacher_size=shapes.teacher.hidden_size,
            student_size=shapes.student.hidden_size,
            tp_group=groups.tp,
            dtype=dtype,
            device=groups.device,
        )
        self.cloned_weights = self._pair_weights()
        self._set_trainable()
        self._captured: dict[tuple[int, str], Tensor] = {}
        self._inverse_widths: dict[str, Tensor] = {}
        self._token_weight: Tensor | None = None  # [s, b], set for the micro-batch in progress
        self._input: Tensor | None = None
        self._capture_activations()

    # --- construction -------------------------------------------------------------------------------------------

    def _has_tied_head(self) -> bool:
        return self.post_process and self.shapes.student.is_tied

    def _has_own_head(self) -> bool:
        return self.post_process and not self.shapes.student.is_tied

    def _share_tied_weights(self) -> None:
        """On a stage with both ends, a tied model's head is its embedding. Elsewhere each end has its own copy."""
        for model, shape in ((self.teacher, self.shapes.teacher), (self.student, self.shapes.student)):
            if shape.is_tied and self.pre_process and self.post_process:
                model.output_layer.weight = model.embedding.word_embeddings.weight

    def _pair_weights(self) -> list[ClonedWeight]:
        """Every student matrix on this stage, beside the teacher's and the name of its projection."""
        weights = []

        def pair(projection: str, site: Site, teacher: nn.Module, student: nn.Module) -> None:
            old, new = (model.get_parameter(f"{site.linear}.weight") for model in (teacher, student))
            weights.append(ClonedWeight(projection, site, old, new, self.heads))

        if self.pre_process:
            pair(EMBED.name, EMBED, self.teacher, self.student)
        teacher_layers = dict(layers_of(self.teacher))
        for index, layer in layers_of(self.student):
            for site in LAYER_SITES:
                pair(f"layers.{index}.{site.name}", site, teacher_layers[index], layer)
        if self._has_own_head():
            pair(LM_HEAD.name, LM_HEAD, self.teacher, self.student)
        elif self.post_process and not self.pre_process:
            pair(EMBED.name, LM_HEAD, self.teacher, self.student)
        return weights

    def _set_trainable(self) -> None:
        """The teacher is frozen. The student's matrices gather gradients; its biases are the teacher's, unchanged."""
        self.teacher.requires_grad_(False)
        matrices = {id(weight.student): weight.student for weight in self.cloned_weights}
        gains = {id(gain) for gain in norm_gains(self.student).values()}
        for parameter in self.student.parameters():
            parameter.requires_grad_(id(parameter) in matrices or id(parameter) in gains)
        for matrix in matrices.values():
            accumulate_in_fp32(matrix)

    def _capture_activations(self) -> None:
        for model, hook in ((self.teacher, self._keep_teacher_output), (self.student, self._attach_clone_loss)):
            for index, layer in layers_of(model):
                for linear in CAPTURED_LINEARS:
                    layer.get_submodule(linear).register_forward_hook(_with_place(hook, index, linear))

    # --- forward ------------------------------------------------------------------------------------------------

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor | None) -> None:
        """[s/tp, b, D + d] from the stage before; called by the schedules."""
        self._input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """batch: tokens, labels, loss_mask, position_ids, each [b, s].

        Gives [s/tp, b, D + d] for the next stage; on the last stage the LM + KL loss summed over tokens.
        """
        self._token_weight = batch["loss_mask"].t().contiguous()  # [s, b]
        teacher_in, student_in = self._split_input()
        with torch.no_grad():
            teacher_hidden = _run_stage(self.teacher, batch, teacher_in)
        student_hidden = _run_stage(self.student, batch, student_in)
        assert not self._captured, "a student layer did not meet its teacher's activation"
        if not self.post_process:
            return torch.cat([teacher_hidden, student_hidden], dim=-1)
        return self._lm_and_kl(teacher_hidden, student_hidden, batch["labels"])

    def forward_teacher(self, batch: dict[str, Tensor]) -> Tensor:
        """The teacher alone, for calibration. Same outputs and inputs as `forward`, the student's part zero."""
        teacher_in, _ = self._split_input()
        with torch.no_grad():
            hidden = _run_stage(self.teacher, batch, teacher_in)
        self._captured.clear()
        if self.post_process:
            return hidden.new_zeros(())
        return torch.cat([hidden, hidden.new_zeros(*hidden.shape[:2], self.shapes.student.hidden_size)], dim=-1)

    def _split_input(self) -> tuple[Tensor | None, Tensor | None]:
        if self.pre_process:
            return None, None
        assert self._input is not None
        width = self.shapes.teacher.hidden_size
        return self._input[..., :width].detach(), self._input[..., width:]

    def _lm_and_kl(self, teacher_hidden: Tensor, student_hidden: Tensor, labels: Tensor) -> Tensor:
        assert self._token_weight is not None
        if self.student.config.sequence_parallel:
            teacher_hidden = gather_from_sequence_parallel_region(teacher_hidden, tensor_parallel_output_grad=False)
            student_hidden = gather_from_sequence_parallel_region(student_hidden, tensor_parallel_output_grad=True)
        loss, lm, kl = lm_and_kl_loss(
            student_hidden.flatten(0, 1),  # [s*b, d]
            teacher_hidden.flatten(0, 1),  # [s*b, D]
            self.student.output_layer.weight,
            self.teacher.output_layer.weight,
            labels.t().flatten(),
            self._token_weight.flatten(),
            shard=self.vocabulary,
            kl_weight=self.settings.loss.kl_weight,
            temperature=self.settings.loss.kl_temperature,
            chunk_tokens=self.settings.loss.loss_chunk_tokens,
        )
        if self.groups.tp.rank() == 0:
            self.sums.main += torch.stack([lm.double(), kl.double(), self._token_weight.sum().double()])
        return loss

    # --- captures -----------------------------------------------------------------------------------------------

    def _keep_teacher_output(self, layer: int, linear: str, output: tuple[Tensor, Any]) -> None:
        self._captured[layer, linear] = output[0]

    def _attach_clone_loss(self, layer: int, linear: str, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """Compare a student's linear output with the teacher's of the same place, and hang the loss on it."""
        assert self._token_weight is not None
        student, target = output[0], self._captured.pop((layer, linear))
        token_weight, sites = self._token_weight, SITES_OF[linear]
        if sites[0].projected == "output":
            target = target @ self.projections.target(f"layers.{layer}.{sites[0].name}")  # [s/tp, b, d]
            if self.student.config.sequence_parallel:
                token_weight = token_weight.chunk(self.groups.tp.size())[self.groups.tp.rank()]  # [s/tp, b]
        if linear not in self._inverse_widths:
            widths = inverse_widths(sites, self.heads, student.shape[-1], self.groups.tp.size())
            self._inverse_widths[linear] = widths.to(student.device, torch.promote_types(student.dtype, torch.float32))
        scale = self.settings.loss.alpha * self._main_loss_scale()
        attached, per_feature = AttachCloneLoss.apply(
            student, target, token_weight, self._inverse_widths[linear], scale
        )
        for site in sites:
            self.sums.clone[layer, LAYER_SITES.index(site)] += select(site, per_feature, self.heads).sum()
        return attached, output[1]

    def _main_loss_scale(self) -> Tensor | float:
        """What the schedule multiplies the main loss by before backward (fp16 loss scaling; 1 otherwise)."""
        scale = self.config.grad_scale_func
        return 1.0 if scale is None else scale(torch.ones((), device=self.groups.device))


def _with_place(hook: Any, layer: int, linear: str) -> Any:
    return lambda module, inputs, output: hook(layer, linear, output)


def _run_stage(model: GPTModel, batch: dict[str, Tensor], hidden: Tensor | None) -> Tensor:
    """[s/tp, b, h]: the residual stream after this stage; after the final norm on the last."""
    model.set_input_tensor(hidden)
    return model(batch["tokens"], batch["position_ids"], None)
