"""Paired stages whose student is no clone: it starts as ordinary training of a new model does."""

from collections.abc import Sequence

from megatron_lrc.methods.lrc.building import build_paired_stages
from megatron_lrc.methods.lrc.paired_model import PairedModel
from megatron_lrc.methods.method import Materials, Method
from megatron_lrc.methods.ordinary.initial_weights import InitialWeights
from megatron_lrc.methods.weights import load_frozen, load_weights


def build_stages(method: Method, materials: Materials) -> list[PairedModel]:
    stages = build_paired_stages(method, materials)
    if materials.is_new:
        initialize_own_matrices(method, materials, stages)
    return stages


def initialize_own_matrices(method: Method, materials: Materials, stages: Sequence[PairedModel]) -> None:
    config, base = method.config, materials.base
    shape, std = method.student_shape(base.shape), config.projection.init_method_std
    initial = InitialWeights(base, shape, std=std, seed=config.training.seed)
    for stage in stages:
        load_weights(stage, stage.student, initial)
        load_frozen(stage, stage.student, initial)
        stage.initialize_maps(config.training.seed)
