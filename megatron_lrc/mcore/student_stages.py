"""Which layers a pipeline stage holds: the teacher's, as megatron-core divides them, and the student's made of them.

A student without some of its teacher's layers is divided as its teacher is: by a layout of its own, in megatron-core's
spelling, that puts each of its layers on the stage of the teacher's layer that it is made of.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_lrc.config import Config, ConfigError, ModelShape
from megatron_lrc.mcore.gpt_models import layers_per_stage


def layers_by_stage(config: Config, shape: ModelShape) -> dict[tuple[int, int], range]:
    """(pipeline rank, chunk) -> the layers (from 0) of a model of this shape there, in the order of the forward
    pass."""
    per_rank, begin, stages = layers_per_stage(config, shape), 0, {}
    for chunk in range(config.num_chunks):
        for rank, counts in enumerate(per_rank):
            stages[rank, chunk] = range(begin, begin := begin + counts[chunk])
    return stages


def config_of_student(config: Config, teacher: ModelShape, student: ModelShape) -> Config:
    """The configuration that the student's stages are built from: the run's, but where it has fewer layers."""
    if not student.teacher_layers or config.parallel.pipeline_model_parallel_size == 1:
        return config
    counts = [len(own) for _, own in _both_by_stage(config, teacher, student)]
    layout = "E" + "|".join("t" * count for count in counts) + "L"
    parallel = replace(
        config.parallel,
        pipeline_model_parallel_layout=layout,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )
    return replace(config, parallel=parallel)


def check_student_stages(config: Config, teacher: ModelShape, student: ModelShape) -> None:
    """ConfigError where a stage has layers of the teacher, but none of the student."""
    for place, (held, own) in enumerate(_both_by_stage(config, teacher, student)):
        if held and not own:
            raise ConfigError(
                f"Pipeline stage {place} would hold layers {held[0]}-{held[-1]} of the teacher, and the student has "
                "none of them, but each stage trains a part of the student. Use a smaller "
                "--pipeline-model-parallel-size or --num-virtual-stages-per-pipeline-rank, or keep a layer there "
                "(--student-layers)."
            )


def _both_by_stage(config: Config, teacher: ModelShape, student: ModelShape) -> Iterator[tuple[range, tuple[int, ...]]]:
    """The layers of both models on each stage, in the order of the forward pass."""
    return ((held, student.layers_among(held)) for held in layers_by_stage(config, teacher).values())
