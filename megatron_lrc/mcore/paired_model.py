"""PairedModel: one pipeline stage of the teacher and of the student, the captures between them, where losses attach.

What travels between stages is [teacher_hidden, student_hidden] side by side; the configuration that megatron-core's
schedules see has hidden_size D + d, so their buffers fit. The teacher runs first, without autograd; forward hooks on
its linear layers keep their outputs until the student's same layer has produced its own, where the clone loss is
attached.

Notation: s sequence, b micro-batch, D teacher hidden, d student hidden, f a linear layer's features; `/tp` split.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_lrc.clone.losses import CarryLoss, CloneLoss, inverse_widths
from megatron_lrc.clone.projections import (
    ClonedWeight,
    Projections,
    accumulate_in_fp32,
    gradient_of,
    zero_gradient,
)
from megatron_lrc.clone.sites import CAPTURED_LINEARS, EMBED, LAYER_SITES, LM_HEAD, Site, projection_names, select
from megatron_lrc.clone.vocab_parallel import HeadLossSettings, VocabularyShard, lm_and_kl_loss
from megatron_lrc.config import Config
from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.mcore.kernels import own_precision
from megatron_lrc.mcore.models import build_stage, head_layout, layers_of, norm_gains, padded_vocab_size, tie_ends
from megatron_lrc.mcore.stages import NORMS, LossSums, PipelineStage, Shapes, Trained, run_stage

#: What a checkpoint calls what is trained: the projections (D, d), and the student's norm gains (d,).
PROJECTIONS, GAINS = "projections.", "norms."

SITES_OF: dict[str, list[Site]] = {
    linear: [site for site in LAYER_SITES if site.linear == linear] for linear in CAPTURED_LINEARS
}


@dataclass(slots=True)
class MicroBatch:
    """What belongs to one micro-batch while it is under way.

    token_weight: [s, b], 0 for masked tokens. activations: the teacher's outputs that the student has yet to meet, by
    (layer, linear). inputs: arguments of the teacher's attention and MLP blocks, by (layer, block), for recomputation.
    """

    token_weight: Tensor
    activations: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    inputs: dict[tuple[int, str], tuple[tuple, dict[str, Any]]] = field(default_factory=dict)
    is_recomputing: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """A linear layer whose outputs are compared, and the sites in it whose terms are on. layer: global, from 0."""

    layer: int
    linear: str
    teacher_layer: nn.Module
    sites: list[Site]

    @property
    def block(self) -> str:
        """The part of a transformer layer that holds it: self_attention or mlp."""
        return self.linear.partition(".")[0]

    @property
    def teacher_block(self) -> nn.Module:
        return self.teacher_layer.get_submodule(self.block)


class PairedModel(PipelineStage):
    """One stage of both models. `projections` generates the student's weights and is what an optimizer trains.

    chunk: which of this rank's virtual stages (0 without interleaving). A stage at an end may have no layers.
    """

    pulls_back = True

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
        self.teacher = build_stage(config, shapes.teacher, shapes.inverse_frequencies, is_trained=False, **place)
        self.student = build_stage(config, shapes.student, shapes.inverse_frequencies, is_trained=True, **place)
        tie_ends(self.teacher, shapes.teacher)
        tie_ends(self.student, shapes.student)
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
        self._micro_batch: MicroBatch | None = None  # the one in progress
        self._inverse_widths: dict[tuple, Tensor] = {}
        self._input: Tensor | None = None
        self._capture_activations()

    # --- construction -------------------------------------------------------------------------------------------

    def _has_tied_head(self) -> bool:
        return self.post_process and self.shapes.student.is_tied

    def _has_own_head(self) -> bool:
        return self.post_process and not self.shapes.student.is_tied

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
        teacher_layers = dict(layers_of(self.teacher))
        is_detached = self.settings.loss.detach_clone_targets
        kept: set[tuple[int, str]] = set()  # blocks whose inputs are kept: one hook for both of their linears
        for index, student_layer in layers_of(self.student):
            terms = self.settings.clone_terms_of(index)
            for linear in CAPTURED_LINEARS:
                sites = [site for site in SITES_OF[linear] if site.name in terms]
                if not sites:
                    continue
                place = Place(index, linear, teacher_layers[index], sites)
                if sites[0].projected == "output" and not self._compares_at_teacher_width(place):
                    self.projections.add_target(f"layers.{index}.{sites[0].name}", is_detached=is_detached)
                teacher_linear, student_linear = (
                    layer.get_submodule(linear) for layer in (place.teacher_layer, student_layer)
                )
                teacher_linear.register_forward_hook(partial(self._keep_teacher_output, place))
                student_linear.register_forward_hook(partial(self._attach_clone_loss, place))
                if self._is_recomputed(place) and (index, place.block) not in kept:
                    kept.add((index, place.block))
                    place.teacher_block.register_forward_pre_hook(
                        partial(self._keep_teacher_input, place), with_kwargs=True
                    )

    def _is_recomputed(self, place: Place) -> bool:
        """Whether the student may run this linear again in backward. (Attention's core has no linear in it.)"""
        parallel = self.settings.parallel
        if parallel.recompute_granularity == "selective":
            return place.block in parallel.recompute_modules
        return parallel.recompute_granularity == "full"

    # --- what is trained ----------------------------------------------------------------------------------------

    @property
    def trained_module(self) -> nn.Module:
        return self.projections

    def trained(self) -> Iterator[Trained]:
        """Every P, in shards of its rows, and the norm gains."""
        for name, matrix in self.projections.named_matrices():
            group = name.rpartition(".")[2]
            is_tied = group == EMBED.name and self.shapes.student.is_tied
            yield Trained(name, PROJECTIONS + name, matrix, (group,), split=0, is_at_both_ends=is_tied)
        for name, gain in self.projections.named_norms():
            yield Trained(name, GAINS + name, gain, (NORMS,))

    @property
    def models(self) -> Mapping[str, GPTModel]:
        return {"teacher": self.teacher, "student": self.student}

    def matrix_gradients(self) -> Iterator[tuple[Site, int | None, Tensor]]:
        for weight in self.cloned_weights:
            grad = gradient_of(weight.student)
            if grad is not None:
                layer = int(weight.projection.split(".")[1]) if weight.site in LAYER_SITES else None
                yield weight.site, layer, select(weight.site, grad, self.heads)

    def zero_gradients(self) -> None:
        for weight in self.cloned_weights:
            zero_gradient(weight.student)

    def compose(self) -> None:
        """W_S <- f(W_T, P)."""
        self.projections.compose(self.cloned_weights)

    def pull_back(self, when_complete: Callable[[nn.Parameter], None]) -> None:
        """dP += f^T(W_T, dW_S)."""
        self.projections.pull_back(self.cloned_weights, when_complete)

    # --- forward ------------------------------------------------------------------------------------------------

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor | None) -> None:
        """[s/tp, b, D + d] from the stage before; called by the schedules."""
        self._input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """batch: tokens, labels, loss_mask, position_ids, each [b, s]; documents (`find_documents`) if they are apart.

        Gives [s/tp, b, D + d] for the next stage; on the last stage the LM + KL loss summed over tokens.
        """
        micro_batch = self._micro_batch = MicroBatch(batch["loss_mask"].t().contiguous())
        teacher_in, student_in = self._split_input()
        with torch.no_grad():
            teacher_hidden = run_stage(self.teacher, batch, teacher_in)
        student_hidden = run_stage(self.student, batch, student_in)
        assert not micro_batch.activations, "a student layer did not meet its teacher's activation"
        if micro_batch.inputs:
            student_hidden = _EnterBackward.apply(student_hidden, self, micro_batch)
        if not self.post_process:
            return torch.cat([teacher_hidden, student_hidden], dim=-1)
        return self._lm_and_kl(teacher_hidden, student_hidden, batch["labels"])

    def forward_teacher(self, batch: dict[str, Tensor]) -> Tensor:
        """The teacher alone, for calibration. Same outputs and inputs as `forward`, the student's part zero."""
        teacher_in, _ = self._split_input()
        self._micro_batch = MicroBatch(batch["loss_mask"].t())
        with torch.no_grad():
            hidden = run_stage(self.teacher, batch, teacher_in)
        self._micro_batch = None
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
        assert self._micro_batch is not None
        token_weight = self._micro_batch.token_weight
        if self.student.config.sequence_parallel:
            teacher_hidden = gather_from_sequence_parallel_region(teacher_hidden, tensor_parallel_output_grad=False)
            student_hidden = gather_from_sequence_parallel_region(student_hidden, tensor_parallel_output_grad=True)
        loss, sums = lm_and_kl_loss(
            student_hidden.flatten(0, 1),  # [s*b, d]
            teacher_hidden.flatten(0, 1),  # [s*b, D]
            self.student.output_layer.weight,
            self.teacher.output_layer.weight,
            labels.t().flatten(),
            token_weight.flatten(),
            shard=self.vocabulary,
            settings=HeadLossSettings(
                lm=self.settings.loss.lm_weight,
                kl=self.settings.total_kl_weight,
                temperature=self.settings.loss.kl_temperature,
                chunk_tokens=self.settings.loss.loss_chunk_tokens,
                loss_scale=self.main_loss_scale(),
            ),
        )
        if self.groups.tp.rank() == 0:
            self.sums.main += torch.cat([sums.double(), token_weight.sum().double().view(1)])
        return loss

    # --- captures -----------------------------------------------------------------------------------------------

    def _keep_teacher_output(self, place: Place, module: nn.Module, inputs: tuple, output: tuple[Tensor, Any]) -> None:
        assert self._micro_batch is not None
        self._micro_batch.activations[place.layer, place.linear] = output[0]

    def _keep_teacher_input(self, place: Place, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        assert self._micro_batch is not None
        self._micro_batch.inputs[place.layer, place.block] = (args, kwargs)

    def _teacher_output(self, place: Place) -> Tensor:
        """The teacher's activation of a place. Where the student recomputes its own, the teacher's is recomputed too:
        kept, they would take most of the memory that recomputation frees."""
        assert self._micro_batch is not None
        key, activations = (place.layer, place.linear), self._micro_batch.activations
        if key not in activations:
            args, kwargs = self._micro_batch.inputs[place.layer, place.block]
            with torch.no_grad(), own_precision(self.teacher, place.layer, inside=self.student):
                place.teacher_block(*args, **kwargs)  # its hooks fill `activations`
        return activations.pop(key)

    def _attach_clone_loss(
        self, place: Place, module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]
    ) -> tuple[Tensor, Any]:
        """Compare a student's linear output with the teacher's of the same place, and hang the loss on it."""
        assert self._micro_batch is not None
        micro_batch, target = self._micro_batch, self._teacher_output(place)
        compared, token_weight = output[0], micro_batch.token_weight
        if place.sites[0].projected == "output":
            compared, target = self._output_pair(place, inputs[0], output[0], target)  # [s/tp, b, d] or [s/tp, b, D]
            if self.student.config.sequence_parallel:
                token_weight = token_weight.chunk(self.groups.tp.size())[self.groups.tp.rank()]  # [s/tp, b]
        scale = self.settings.loss.alpha * self.main_loss_scale()
        compared, per_feature = CloneLoss.apply(
            compared, target, token_weight, self._inverse_width(place, compared), scale
        )
        if not micro_batch.is_recomputing:
            for site in place.sites:
                self.sums.clone[place.layer, LAYER_SITES.index(site)] += select(site, per_feature, self.heads).sum()
        is_beside = self._compares_at_teacher_width(place)
        return CarryLoss.apply(output[0], compared) if is_beside else compared, output[1]

    def _compares_at_teacher_width(self, place: Place) -> bool:
        return place.sites[0].name == "o" and self.settings.loss.clone_attention_output == "teacher"

    def _output_pair(self, place: Place, attention: Tensor, student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared at o and down: at student width, or for o at the teacher's, as the flags say."""
        (site,) = place.sites
        if self._compares_at_teacher_width(place):
            # forward(), not a call: the hooks of this linear belong to the teacher's own pass.
            with own_precision(self.teacher, place.layer, inside=self.student):
                through_teacher, _ = place.teacher_layer.get_submodule(place.linear).forward(attention)
            return through_teacher, target
        return student, target @ self.projections.target(f"layers.{place.layer}.{site.name}")

    def _inverse_width(self, place: Place, compared: Tensor) -> Tensor:
        key = (place.linear, tuple(site.name for site in place.sites), compared.shape[-1])
        if key not in self._inverse_widths:
            widths = inverse_widths(place.sites, self.heads, compared.shape[-1], self.groups.tp.size())
            wide = torch.promote_types(compared.dtype, torch.float32)
            self._inverse_widths[key] = widths.to(compared.device, wide)
        return self._inverse_widths[key]


class _EnterBackward(torch.autograd.Function):
    """The identity; its backward tells the stage which micro-batch the layers that are about to recompute belong to."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, stage: PairedModel, micro_batch: MicroBatch) -> Tensor:
        ctx.stage, ctx.micro_batch = stage, micro_batch
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.micro_batch.is_recomputing = True
        ctx.stage._micro_batch = ctx.micro_batch
        return grads[0], None, None
