"""Weights from disk into a stage: each rank reads its slices, and nothing else."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lrc.checkpoints.layout import QK_NORMS
from megatron_lrc.clone.sites import EMBED, LAYER_SITES, LM_HEAD, Site, select
from megatron_lrc.hf.reader import Reader
from megatron_lrc.mcore.gpt_models import GPTModel, layers_of, norm_gains, padded_vocab_size
from megatron_lrc.mcore.stages import PipelineStage


@torch.no_grad()
def load_weights(stage: PipelineStage, model: GPTModel, reader: Reader) -> None:
    """Read this rank's slices of a model from disk into one of the stage's models: matrices, norm gains, and what a
    teacher and its student share."""
    groups = stage.groups

    def read(site: Site) -> Tensor:
        return reader.site(site, tp_rank=groups.tp.rank(), tp_size=groups.tp.size(), padded_vocab_size=vocab)

    vocab = padded_vocab_size(stage.shapes.teacher.vocab_size, groups.tp.size())
    if stage.pre_process:
        model.embedding.word_embeddings.weight.copy_(read(EMBED))
    load_layers(stage, model, reader)
    if stage.post_process:
        model.get_parameter("output_layer.weight").copy_(read(LM_HEAD))
    for name, gain in norm_gains(model).items():
        *layer_name, kind = name.split(".")
        gain.copy_(reader.norm(kind, int(layer_name[1]) if layer_name else None))
    load_frozen(stage, model, reader)


@torch.no_grad()
def load_layers(stage: PipelineStage, model: GPTModel, reader: Reader) -> None:
    """The matrices of its layers."""
    tp = stage.groups.tp
    for index, layer in layers_of(model):
        for site in LAYER_SITES:
            place = select(site, layer.get_parameter(f"{site.linear}.weight"), stage.heads)
            place.copy_(reader.site(site, index, tp_rank=tp.rank(), tp_size=tp.size()).view(place.shape))
    model.set_is_first_microbatch()  # FP8 copies of the weights, if there are any, are to be made anew


@torch.no_grad()
def load_frozen(
    stage: PipelineStage, model: GPTModel, reader: Reader, source_of: Callable[[int], int] = lambda layer: layer
) -> None:
    """Read what a teacher and its student share: biases of q, k and v, gains of the q and k norms. source_of: the
    reader's layer that a layer of the model has them from."""
    tp, frozen = stage.groups.tp, reader.description.family.frozen
    for index, layer in layers_of(model):
        for site in LAYER_SITES:
            if (name := f"{site.name}_bias") in frozen:
                place = select(site, layer.get_parameter(f"{site.linear}.bias"), stage.heads)
                found = reader.frozen(name, source_of(index), tp_rank=tp.rank(), tp_size=tp.size())
                place.copy_(found.view(place.shape))
            for kind in QK_NORMS:
                if (name := f"{site.name}{kind}") in frozen:
                    gain = layer.get_parameter(f"self_attention.{site.name}_layernorm.weight")
                    gain.copy_(reader.frozen(name, source_of(index), tp_rank=tp.rank(), tp_size=tp.size()))
