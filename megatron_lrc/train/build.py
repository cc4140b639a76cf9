"""From a Config to the objects of a run: both models with the teacher's weights in place, projections initialised."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from megatron_lrc.clone.initialization import SecondMoment, initialize_from_basis, initialize_random
from megatron_lrc.clone.sites import EMBED, LAYER_SITES, LM_HEAD, Site, select
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.hf.families import TeacherDescription, rope_inverse_frequencies
from megatron_lrc.hf.reader import Reader
from megatron_lrc.mcore.distributed import Groups, broadcast_from_first, sum_over_world
from megatron_lrc.mcore.models import layers_of, norm_gains, padded_vocab_size, residual_readers
from megatron_lrc.mcore.paired_model import PairedModel, Shapes
from megatron_lrc.mcore.schedules import forward_teacher

Batches = Iterator[dict[str, Tensor]]


def build_stages(
    config: Config, teacher: TeacherDescription, reader: Reader, groups: Groups, dtype: torch.dtype
) -> list[PairedModel]:
    """This rank's stages (one, without interleaving), the teacher read into its shards; projections are still zero."""
    shapes = Shapes(teacher.shape, config.student_shape(teacher.shape), rope_inverse_frequencies(teacher))
    stages = [PairedModel(config, shapes, groups, dtype, chunk) for chunk in range(config.num_chunks)]
    for stage in stages:
        load_teacher(stage, reader)
    return stages


@torch.no_grad()
def load_teacher(stage: PairedModel, reader: Reader) -> None:
    """Read this rank's slices of the teacher, and nothing else of it, from disk into the stage."""
    groups, model = stage.groups, stage.teacher

    def read(site: Site, layer: int | None, **extra: int) -> Tensor:
        return reader.site(site, layer, tp_rank=groups.tp.rank(), tp_size=groups.tp.size(), **extra)

    vocab = padded_vocab_size(stage.shapes.teacher.vocab_size, groups.tp.size())
    if stage.pre_process:
        model.embedding.word_embeddings.weight.copy_(read(EMBED, None, padded_vocab_size=vocab))
    for index, layer in layers_of(model):
        for site in LAYER_SITES:
            weight = layer.get_parameter(f"{site.linear}.weight")
            place = select(site, weight, stage.heads)
            place.copy_(read(site, index).view(place.shape))
    if stage.post_process:
        model.get_parameter("output_layer.weight").copy_(read(LM_HEAD, None, padded_vocab_size=vocab))
    for name, gain in norm_gains(model).items():
        *layer_name, kind = name.split(".")
        gain.copy_(reader.norm(kind, int(layer_name[1]) if layer_name else None))
    for either in (stage.teacher, stage.student):
        for index, layer in layers_of(either):
            _load_frozen(stage, layer, index, reader)


def _load_frozen(stage: PairedModel, layer: nn.Module, index: int, reader: Reader) -> None:
    """Set the tensors of a layer that teacher and student share: biases of q, k and v, gains of the q and k norms."""
    tp, frozen = stage.groups.tp, reader.description.family.frozen
    for site in LAYER_SITES:
        if (name := f"{site.name}_bias") in frozen:
            place = select(site, layer.get_parameter(f"{site.linear}.bias"), stage.heads)
            place.copy_(reader.frozen(name, index, tp_rank=tp.rank(), tp_size=tp.size()).view(place.shape))
        if (name := f"{site.name}_norm") in frozen:
            layer.get_parameter(f"self_attention.{site.name}_layernorm.weight").copy_(reader.frozen(name, index))


def initialize(config: Config, stages: list[PairedModel], calibration: Callable[[], Batches], groups: Groups) -> None:
    """Give every projection its first value, as --init says. `calibration` opens the training data from its start."""
    if config.projection.init == "random":
        for stage in stages:
            initialize_random(stage.projections, std=config.projection.init_method_std, seed=config.training.seed)
        return
    basis = residual_basis(config, stages, calibration(), groups)
    for stage in stages:
        initialize_from_basis(stage.projections, basis, norm_gains(stage.teacher))


def residual_basis(config: Config, stages: list[PairedModel], batches: Batches, groups: Groups) -> Tensor:
    """Q [D, d], fp64: leading directions of the teacher's residual stream; computed once, the same on every rank."""
    shapes = stages[0].shapes
    moment = SecondMoment(shapes.teacher.hidden_size, groups.device)
    norms = [norm for stage in stages for norm in residual_readers(stage.teacher)]
    hooks = [norm.register_forward_pre_hook(lambda module, inputs: moment.add(inputs[0])) for norm in norms]
    tokens_at_once = config.training.micro_batch_size * config.training.seq_length * groups.dp.size()
    try:
        forward_teacher(
            stages, batches, config, num_microbatches=-(-config.projection.calibration_tokens // tokens_at_once)
        )
    except StopIteration:
        raise ConfigError(
            f"--calibration-tokens {config.projection.calibration_tokens} is more than the training data holds. "
            "Use fewer."
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    sum_over_world(moment.total)
    basis = moment.leading_eigenvectors(shapes.student.hidden_size).to(groups.device)
    return broadcast_from_first(basis)  # eigenvectors of near-equal eigenvalues may differ between machines
