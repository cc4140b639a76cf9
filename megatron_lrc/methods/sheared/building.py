"""The stages of a model that is pruned: the full model with its masks, and what the cut leaves of it."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_lrc.hf.rope import rotations
from megatron_lrc.mcore.stages import PipelineStage, Shapes
from megatron_lrc.methods.method import Materials, Method
from megatron_lrc.methods.ordinary import building as ordinary
from megatron_lrc.methods.sheared.masks import Masks, masks_between
from megatron_lrc.methods.sheared.sheared_model import ShearedModel
from megatron_lrc.methods.weights import load_weights


def build_stages(method: Method, materials: Materials) -> Sequence[PipelineStage]:
    """After the cut those of an ordinary model; before it with masks, and the weights that the reader has."""
    if materials.has_changed:
        return ordinary.build_stages(method, materials)
    config, base, groups = method.config, materials.base, materials.groups
    shapes = Shapes(base.shape, base.shape, rotations(base, config.training.seq_length))
    masks = Masks(masks_between(base.shape, method.student_shape(base.shape)), config, groups.device)
    stages = [
        ShearedModel(config, shapes, groups, materials.dtype, chunk, masks=masks) for chunk in range(config.num_chunks)
    ]
    if materials.is_new:
        for stage in stages:
            load_weights(stage, stage.student, materials.reader)
            stage.adopt_weights()
    return stages


def change_stages(method: Method, stages: Sequence[PipelineStage]) -> None:
    """The cut: from here on what the masks leave of the model is trained, by itself."""
    full = stages[0].shapes
    pruned = method.student_shape(full.student)
    for stage in stages:
        assert isinstance(stage, ShearedModel)
        stage.prune(replace(full, teacher=pruned, student=pruned))
