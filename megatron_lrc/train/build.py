"""From a Config to the objects of a run: the stages of its method, weights in place, projections initialised."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from megatron_lrc.clone.sites import EMBED, LAYER_SITES, LM_HEAD, Site, select
from megatron_lrc.config import Config
from megatron_lrc.hf.families import TeacherDescription, rope_inverse_frequencies
from megatron_lrc.hf.reader import Reader
from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.mcore.gpt_models import GPTModel, layers_of, norm_gains, padded_vocab_size
from megatron_lrc.mcore.stages import PipelineStage, Shapes
from megatron_lrc.methods.lrc.calibration import Batches, initialize
from megatron_lrc.methods.lrc.clone_captures import CloneLosses
from megatron_lrc.methods.lrc.layer_losses import LayerLosses, LayerLossesFactory
from megatron_lrc.methods.lrc.paired_model import PairedModel
from megatron_lrc.methods.ordinary.initial_weights import InitialWeights
from megatron_lrc.methods.ordinary.single_model import SingleModel
from megatron_lrc.methods.sheared.masks import Masks, MaskSettings, masks_between
from megatron_lrc.methods.sheared.sheared_model import ShearedModel
from megatron_lrc.methods.tinybert.tinybert_losses import TinyBertLosses


def build_stages_of_method(
    config: Config,
    base: TeacherDescription,
    reader: Reader,
    groups: Groups,
    dtype: torch.dtype,
    calibration: Callable[[], Batches],
    *,
    is_new: bool,
    is_open: bool = False,
    is_pruned: bool = False,
) -> Sequence[PipelineStage]:
    """This rank's stages of what --method says. base, reader: of the teacher, or of the model to train.

    is_new: with the values that training begins with; otherwise what is trained is still to be loaded.
    is_open: as --open-after leaves it. is_pruned: whether --method sheared has cut the model.
    """
    if config.is_sheared and not is_pruned:
        return build_sheared_model(config, base, reader if is_new else None, groups, dtype)
    if not config.has_teacher:
        return build_single_model(config, base, reader if is_new else None, groups, dtype)
    own = config.own_matrices(is_open=is_open)
    stages = build_stages(config, base, reader, groups, dtype, own)
    if is_new and config.is_clone:
        initialize(config, stages, calibration, groups)
    elif is_new:
        initialize_own_matrices(config, stages, base)
    return stages


def build_single_model(
    config: Config, base: TeacherDescription, reader: Reader | None, groups: Groups, dtype: torch.dtype
) -> list[SingleModel]:
    """The stages of a model that is trained by itself, with the weights that `reader` has."""
    shape = config.student_shape(base.shape)
    shapes = Shapes(shape, shape, rope_inverse_frequencies(base))
    stages = [SingleModel(config, shapes, groups, dtype, chunk) for chunk in range(config.num_chunks)]
    if reader is not None:
        for stage in stages:
            load_weights(stage, stage.student, reader)
            load_frozen(stage, stage.student, reader)
    return stages


def build_sheared_model(
    config: Config, base: TeacherDescription, reader: Reader | None, groups: Groups, dtype: torch.dtype
) -> list[ShearedModel]:
    """The stages of a model that is to be pruned, with the weights that `reader` has."""
    shapes = Shapes(base.shape, base.shape, rope_inverse_frequencies(base))
    assert config.prune_step is not None
    settings = MaskSettings(
        pruning_steps=config.prune_step,
        seed=config.training.seed,
        lr=config.pruning.mask_lr,
        beta1=config.optimizer.adam_beta1,
        beta2=config.optimizer.adam_beta2,
        eps=config.optimizer.adam_eps,
    )
    masks = Masks(masks_between(base.shape, config.student_shape(base.shape)), settings, groups.device)
    stages = [ShearedModel(config, shapes, groups, dtype, chunk, masks=masks) for chunk in range(config.num_chunks)]
    if reader is not None:
        for stage in stages:
            load_weights(stage, stage.student, reader)
            load_frozen(stage, stage.student, reader)
            stage.adopt_weights()
    return stages


def build_stages(
    config: Config,
    teacher: TeacherDescription,
    reader: Reader,
    groups: Groups,
    dtype: torch.dtype,
    own: frozenset[str] = frozenset(),
) -> list[PairedModel]:
    """This rank's stages (one, without interleaving), the teacher read into its shards; projections are still zero.

    own: the student's own matrices (`Config.own_matrices`), which have no values yet either.
    """
    shapes = Shapes(teacher.shape, config.student_shape(teacher.shape), rope_inverse_frequencies(teacher))
    losses = layer_losses_of(config)
    stages = [
        PairedModel(config, shapes, groups, dtype, chunk, own, layer_losses=losses)
        for chunk in range(config.num_chunks)
    ]
    for stage in stages:
        load_weights(stage, stage.teacher, reader)
        load_frozen(stage, stage.teacher, reader)
        load_frozen(stage, stage.student, reader)
    return stages


def layer_losses_of(config: Config) -> LayerLossesFactory:
    """What makes the losses between layers that --method and --alpha ask for."""
    if config.loss.alpha and config.is_clone:
        return partial(CloneLosses, terms_of=config.clone_terms_of)
    if config.loss.alpha and config.is_tinybert:
        return TinyBertLosses
    return LayerLosses


def initialize_own_matrices(config: Config, stages: list[PairedModel], base: TeacherDescription) -> None:
    """Give a student that is no clone its first values: those that ordinary training of a new model begins with."""
    shape = stages[0].shapes.student
    initial = InitialWeights(base, shape, std=config.projection.init_method_std, seed=config.training.seed)
    for stage in stages:
        load_weights(stage, stage.student, initial)
        load_frozen(stage, stage.student, initial)
        stage.initialize_layer_losses(config.training.seed)


@torch.no_grad()
def load_weights(stage: PipelineStage, model: GPTModel, reader: Reader) -> None:
    """Read this rank's slices of a model, and nothing else of it, from disk into one of the stage's models: matrices
    and norm gains."""
    groups = stage.groups

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
    model.set_is_first_microbatch()  # FP8 copies of the weights, if there are any, are to be made anew


@torch.no_grad()
def load_frozen(stage: PipelineStage, model: GPTModel, reader: Reader) -> None:
    """Read what a teacher and its student share: biases of q, k and v, gains of the q and k norms."""
    for index, layer in layers_of(model):
        _load_frozen(stage, layer, index, reader)


def _load_frozen(stage: PipelineStage, layer: nn.Module, index: int, reader: Reader) -> None:
    tp, frozen = stage.groups.tp, reader.description.family.frozen
    for site in LAYER_SITES:
        if (name := f"{site.name}_bias") in frozen:
            place = select(site, layer.get_parameter(f"{site.linear}.bias"), stage.heads)
            place.copy_(reader.frozen(name, index, tp_rank=tp.rank(), tp_size=tp.size()).view(place.shape))
        if (name := f"{site.name}_norm") in frozen:
            layer.get_parameter(f"self_attention.{site.name}_layernorm.weight").copy_(reader.frozen(name, index))
