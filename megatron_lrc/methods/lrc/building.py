"""A paired stage from a teacher's files, its projections initialised; and what --open-after makes of it."""

from collections.abc import Sequence
from functools import partial

from megatron_lrc.checkpoints.saved_student import read_kept_rows
from megatron_lrc.config import is_slimmer
from megatron_lrc.hf.kept_rows_reader import KeptFirst, KeptOnly
from megatron_lrc.hf.rope import rotations
from megatron_lrc.mcore.stages import PipelineStage, Shapes
from megatron_lrc.methods.lrc.calibration import calibrate_losses, initialize
from megatron_lrc.methods.lrc.clone_captures import CloneLosses
from megatron_lrc.methods.lrc.importance import choose_kept_rows
from megatron_lrc.methods.lrc.layer_losses import LayerLosses, LayerLossesFactory
from megatron_lrc.methods.lrc.paired_model import PairedModel
from megatron_lrc.methods.method import Materials, Method
from megatron_lrc.methods.weights import load_frozen, load_layers, load_weights


def build_stages(method: Method, materials: Materials) -> list[PairedModel]:
    """Stages of both models. What is not loaded from a checkpoint later, projections get from --init."""
    losses = partial(CloneLosses, terms_of=method.terms_of) if method.config.loss.alpha else LayerLosses
    stages = build_paired_stages(method, materials, losses)
    if is_slimmer(stages[0].shapes.student, stages[0].shapes.teacher):
        keep_rows(method, materials, stages)
    if materials.is_new:
        initialize(method.config, stages, materials.calibration)
    if not materials.is_resumed:
        calibrate_losses(method.config, stages, materials.calibration)
    return stages


def build_paired_stages(
    method: Method, materials: Materials, layer_losses: LayerLossesFactory = LayerLosses
) -> list[PairedModel]:
    """The teacher read into its shards; projections are still zero, and the student's own matrices have no values."""
    config, base, reader = method.config, materials.base, materials.reader
    shapes = Shapes(base.shape, method.student_shape(base.shape), rotations(base, config.training.seq_length))
    own = method.own_matrices(has_changed=materials.has_changed)
    stages = [
        PairedModel(config, shapes, materials.groups, materials.dtype, chunk, own, layer_losses=layer_losses)
        for chunk in range(config.num_chunks)
    ]
    for stage in stages:
        load_weights(stage, stage.teacher, reader)
        if not is_slimmer(shapes.student, shapes.teacher):
            load_frozen(stage, stage.student, reader, shapes.student.teacher_layer)
    return stages


def keep_rows(method: Method, materials: Materials, stages: Sequence[PairedModel]) -> None:
    """Read the teacher's layers again, in the order that a student of fewer KV groups or FFN neurons needs: those of
    the checkpoint, or the most important ones."""
    if materials.checkpoint:
        everywhere = read_kept_rows(materials.checkpoint, stages[0].shapes.student)
        kept = [{index: everywhere[index] for index, _ in stage.teachers_of_student()} for stage in stages]
    else:
        kept = choose_kept_rows(method.config, stages, materials.calibration())
    for stage, rows in zip(stages, kept, strict=True):
        stage.kept = rows
        teacher_layer = stage.shapes.student.teacher_layer
        of_teacher = {teacher_layer(index): kept_rows for index, kept_rows in rows.items()}
        load_layers(stage, stage.teacher, KeptFirst(materials.reader, of_teacher))
        load_frozen(stage, stage.teacher, KeptFirst(materials.reader, of_teacher))
        load_frozen(stage, stage.student, KeptOnly(materials.reader, of_teacher), teacher_layer)


def change_stages(method: Method, stages: Sequence[PipelineStage]) -> None:
    """--open-after: from here on these matrices are the student's own, with the values that they have."""
    for stage in stages:
        assert isinstance(stage, PairedModel)
        stage.open(method.own_matrices(has_changed=True))
