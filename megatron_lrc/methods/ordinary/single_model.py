"""SingleModel: one pipeline stage of one model, all of which is trained on the LM loss: ordinary training.

Its parameters have the names and places that megatron-core's own checkpoints of a GPTModel give them
(`checkpoints/layout.py`), the form that tools/convert_from_hf.py writes.

Notation: s sequence, b micro-batch, d hidden; `/tp` split over tensor parallel ranks.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from megatron_lrc.checkpoints.layout import SITES, key_of
from megatron_lrc.clone.projections import gradient_of
from megatron_lrc.clone.sites import CAPTURED_LINEARS, EMBED, LAYER_SITES, LM_HEAD, HeadLayout, Site, select
from megatron_lrc.clone.vocab_parallel import HeadLossSettings, lm_and_kl_loss
from megatron_lrc.config import Config, ModelShape
from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.mcore.gpt_models import GPTModel, layers_of, norm_gains, vocabulary_shard
from megatron_lrc.mcore.stages import (
    BIASES,
    GRADIENT_GROUPS,
    NORMS,
    LossSums,
    PipelineStage,
    Shapes,
    Trained,
    all_tokens,
    run_stage,
)


class SingleModel(PipelineStage):
    """One stage of the model. Arguments as of `PairedModel`; its weights are not yet set."""

    def __init__(self, config: Config, shapes: Shapes, groups: Groups, dtype: torch.dtype, chunk: int = 0):
        super().__init__(config, groups, dtype, chunk)
        self.sums = LossSums(groups.device)
        self._build(shapes)

    def _build(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.student = self._build_model(shapes.student, shapes.rotations, is_trained=True)
        self.config = copy.copy(self.student.config)
        self.heads = HeadLayout.of(shapes.student)
        self.vocabulary = vocabulary_shard(shapes.student, self.groups.tp)
        self._trained = list(trained_parameters(self.student, shapes.student))

    @property
    def trained_module(self) -> nn.Module:
        return self.student

    def trained(self) -> Iterable[Trained]:
        return self._trained

    @property
    def models(self) -> Mapping[str, GPTModel]:
        return {"student": self.student}

    @property
    def gradient_groups(self) -> tuple[str, ...]:
        return (*GRADIENT_GROUPS, BIASES) if self.shapes.student.has_qkv_bias else GRADIENT_GROUPS

    def matrix_gradients(self) -> Iterator[tuple[Site, int | None, Tensor]]:
        """Once the optimizer has reduced them, of more ranks than this one."""
        for trained in self._trained:
            grad = gradient_of(trained.parameter)
            for group in trained.groups:
                if grad is not None and (site := SITES.get(group)):
                    yield site, trained.layer and trained.layer[0], select(site, grad, self.heads)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """batch: as of `PairedModel.forward`. Gives [s/tp, b, d], or the LM loss summed over tokens."""
        hidden = run_stage(self.student, batch, None if self.pre_process else self._input)
        if not self.post_process:
            return hidden
        token_weight = batch["loss_mask"].t().flatten()
        settings = HeadLossSettings(
            lm=1.0,
            kl=0.0,
            temperature=1.0,
            chunk_tokens=self.settings.loss.chunk_tokens(on_cuda=hidden.is_cuda),
            loss_scale=self.main_loss_scale(),
            logits_scaling=self.shapes.student.logits_scaling,
            logits_soft_cap=self.shapes.student.logits_soft_cap,
        )
        loss, sums = lm_and_kl_loss(
            all_tokens(self.student, hidden),  # [s*b, d]
            None,
            self.student.output_layer.weight,
            None,
            batch["labels"].t().flatten(),
            token_weight,
            shard=self.vocabulary,
            settings=settings,
            is_embedding=self.pre_process and self.shapes.student.is_tied,
        )
        if self.groups.tp.rank() == 0:
            self.sums.add_main(sums, token_weight)
        return loss


def trained_parameters(model: GPTModel, shape: ModelShape) -> Iterator[Trained]:
    """Every parameter of a stage of a model of this shape."""
    ends = {"split": 0, "is_padded": True, "is_at_both_ends": shape.is_tied}
    embed = EMBED.name
    if model.pre_process:
        weight = model.embedding.word_embeddings.weight
        yield Trained(embed, key_of(embed), weight, (embed,), **ends)
    for index, layer in layers_of(model):
        place = (index, shape.num_layers)
        for linear in CAPTURED_LINEARS:
            sites = [site for site in LAYER_SITES if site.linear == linear]
            groups, weight = tuple(site.name for site in sites), layer.get_parameter(f"{linear}.weight")
            name = f"layers.{index}.{linear}.weight"
            is_gated = "gate" in groups
            yield Trained(name, key_of(groups[0]), weight, groups, sites[0].split, place, is_gated)
            if "q" in groups and shape.has_qkv_bias:
                bias = layer.get_parameter(f"{linear}.bias")
                yield Trained(f"layers.{index}.{linear}.bias", key_of("q_bias"), bias, (BIASES,), 0, place)
        names = ("q_norm", "k_norm") * shape.has_qk_norm + ("q_wide_norm", "k_wide_norm") * shape.has_wide_qk_norm
        for kind in names:
            gain, split = layer.get_parameter(f"self_attention.{kind[0]}_layernorm.weight"), None
            if shape.has_wide_qk_norm:
                split = 0
            yield Trained(f"layers.{index}.{kind}", key_of(kind), gain, (NORMS,), split, place)
    for name, gain in norm_gains(model).items():
        *layer_name, kind = name.split(".")
        place = (int(layer_name[1]), shape.num_layers) if layer_name else None
        yield Trained(name, key_of(kind), gain, (NORMS,), layer=place)
    if model.post_process and not shape.is_tied:
        head = LM_HEAD.name
        yield Trained(head, key_of(head), model.output_layer.weight, (head,), **ends)
    elif model.post_process and not model.pre_process:
        yield Trained(embed, key_of(embed), model.output_layer.weight, (embed,), **ends)
