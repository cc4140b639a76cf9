"""The stages of a model that is trained by itself, from a model's files or from initial weights."""

from megatron_lrc.hf.rope import rotations
from megatron_lrc.mcore.stages import Shapes
from megatron_lrc.methods.method import Materials, Method
from megatron_lrc.methods.ordinary.single_model import SingleModel
from megatron_lrc.methods.weights import load_weights


def build_stages(method: Method, materials: Materials) -> list[SingleModel]:
    """With the weights that the reader has, unless a checkpoint's are loaded later."""
    config, base = method.config, materials.base
    shape = method.student_shape(base.shape)
    shapes = Shapes(shape, shape, rotations(base, config.training.seq_length))
    stages = [
        SingleModel(config, shapes, materials.groups, materials.dtype, chunk) for chunk in range(config.num_chunks)
    ]
    if materials.is_new:
        for stage in stages:
            load_weights(stage, stage.student, materials.reader)
    return stages
