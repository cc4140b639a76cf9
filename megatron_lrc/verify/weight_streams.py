"""Models as a stream of weights in the order of the forward pass, and their logits by megatron-core's layers.

A stream gives (our name, tensor) for each weight: whole, in Hugging Face's order of rows, in whatever dtype
its source has.
"""

import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from megatron_lrc.checkpoints.saved_student import SavedStudent, open_checkpoint
from megatron_lrc.clone.rotation import Rotations
from megatron_lrc.config import ConfigError, ModelShape
from megatron_lrc.hf.architectures import Family
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import TeacherDescription, Weight, describe_teacher, expected_weights
from megatron_lrc.hf.teacher_identity import (
    is_same_teacher,
    read_everything,
    short,
    warn_of_samples,
    why_not_comparable,
)
from megatron_lrc.methods import method_of

WeightOf = Callable[[Weight], Tensor]


def stream_logits(
    weights: Iterable[tuple[str, Tensor]],
    shape: ModelShape,
    rotations: Rotations,
    tokens: Tensor,
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
) -> Tensor:
    """[b, s, v], computed in `dtype`. tokens: [b, s]; rotations: those for s tokens.

    weights_dtype: what weights are rounded to first; None leaves them as they come.
    """
    from megatron_lrc.mcore.layer_by_layer import layer_by_layer  # here, since it imports megatron-core

    with layer_by_layer(shape, rotations, tokens, dtype) as forward:
        for key, weight in weights:
            forward.add(key, weight if weights_dtype is None else weight.to(weights_dtype))
        return forward.logits


def stream_weights(family: Family, shape: ModelShape, weight_of: WeightOf) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model of this family and shape, each asked for in its turn. Zeros are left out."""
    weights = expected_weights(family, shape)
    return ((weight.key, weight_of(weight)) for weight in weights if not weight.is_zero)


def open_student(load: str, teacher: str | None = None) -> tuple[SavedStudent, TeacherDescription]:
    """A checkpoint (or the newest of a run) and its teacher, held against each other. ConfigError if they differ.

    teacher: where the teacher is now, if not where it was in the training. Of ordinary training it is the
    model that --student or --teacher named; only config.json and what is copied into an export are needed of
    it.
    """
    student = open_checkpoint(load)
    method, trained_with = method_of(student.config), student.state.teacher_fingerprint
    if refusal := method.why_no_student(student.path, student.state.step, student.state.changed_at):
        raise ConfigError(refusal)
    base = teacher or str(student.config.base_model)
    if not method.has_teacher:
        description = describe_teacher(base, needs_weights=False)
        if description.config_fingerprint != trained_with:
            raise ConfigError(
                f"{base} is not the model that {student.path} was trained from: its config.json differs. "
                "Give the directory of that model with --teacher."
            )
        return student, description
    description = describe_teacher(base)
    reader = open_teacher(description)
    fingerprint = reader.fingerprint(read_everything(reader))
    if not is_same_teacher(fingerprint, reader, trained_with):
        raise ConfigError(
            f"--teacher {description.directory} (fingerprint {short(fingerprint)}) is not the teacher that "
            f"{student.path} was trained with (fingerprint {short(trained_with)}). Give the directory of that teacher "
            f"with --teacher.{why_not_comparable(fingerprint, trained_with)}"
        )
    for line in warn_of_samples(fingerprint, trained_with, student.path, reader):
        print(f"warning: {line}", file=sys.stderr)
    return student, description
