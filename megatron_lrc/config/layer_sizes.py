"""How much of a teacher's layer a student's keeps: --student-num-query-groups and --student-ffn-hidden-size.

A KV group is kept with its query heads, so that queries per group stay the teacher's, and an FFN neuron in gate, up and
down. Which ones is for calibration to say (`methods.lrc.importance`); here are their numbers.
"""

from collections.abc import Iterator
from typing import NamedTuple

from .config import ModelShape, flag_of
from .settings import ModelConfig


class _Size(NamedTuple):
    setting: str
    of_shape: str
    what: str


_SIZES = (
    _Size("student_num_query_groups", "num_query_groups", "KV groups"),
    _Size("student_ffn_hidden_size", "ffn_hidden_size", "FFN neurons"),
)


def kept_sizes(model: ModelConfig, base: ModelShape) -> dict[str, int]:
    """The fields of the student's `ModelShape` that follow from these flags. base: the teacher's."""
    groups = model.student_num_query_groups or base.num_query_groups
    return {
        "num_query_groups": groups,
        "num_attention_heads": groups * (base.num_attention_heads // base.num_query_groups),
        "ffn_hidden_size": model.student_ffn_hidden_size or base.ffn_hidden_size,
    }


def is_slimmer(student: ModelShape, teacher: ModelShape) -> bool:
    """Whether the student's layers have fewer KV groups or FFN neurons than those that they are made of."""
    return any(getattr(student, size.of_shape) != getattr(teacher, size.of_shape) for size in _SIZES)


def check_kept_sizes(model: ModelConfig, base: ModelShape, tp: int) -> Iterator[str]:
    """tp: tensor parallel size."""
    for setting, of_shape, what in _SIZES:
        size, most = getattr(model, setting), getattr(base, of_shape)
        if size is None:
            continue
        if size > most:
            yield (
                f"{flag_of(setting)} {size} is above the teacher's {most} {what}, and a student's layers are made of "
                f"its teacher's. Use at most {most}."
            )
        elif size % tp:
            yield (
                f"{flag_of(setting)} {size} is not divisible by --tensor-model-parallel-size {tp}: each process needs "
                f"an equal part of the {what}. Use a multiple of {tp}."
            )


def refuse_kept_sizes(model: ModelConfig, why: str) -> Iterator[str]:
    """Of a method that trains a model with the layers that it has. why: the end of a clause."""
    for setting, _, _ in _SIZES:
        if (size := getattr(model, setting)) is not None:
            yield f"{flag_of(setting)} {size} cannot go with {why}. Leave it out."
