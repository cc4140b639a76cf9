"""Paired stages whose student is no clone: it starts as ordinary training of a new model does."""

from megatron_lrc.methods.lrc.building import build_paired_stages
from megatron_lrc.methods.lrc.layer_losses import LayerLosses, LayerLossesFactory
from megatron_lrc.methods.lrc.paired_model import PairedModel
from megatron_lrc.methods.method import Materials, Method
from megatron_lrc.methods.ordinary.initial_weights import InitialWeights
from megatron_lrc.methods.weights import load_weights


def build_stages(
    method: Method, materials: Materials, layer_losses: LayerLossesFactory = LayerLosses
) -> list[PairedModel]:
    """All of the student is its own. layer_losses: beside LM and KL."""
    stages = build_paired_stages(method, materials, layer_losses)
    if not materials.is_new:
        return stages
    config, base = method.config, materials.base
    shape, std = method.student_shape(base.shape), config.projection.init_method_std
    initial = InitialWeights(base, shape, std=std, seed=config.training.seed)
    for stage in stages:
        load_weights(stage, stage.student, initial)
        stage.layer_losses.initialize(config.training.seed)
    return stages
