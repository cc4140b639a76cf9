"""Opens what a path holds as a model whose logits can be had: the kinds that `tools/verify_model.py` compares."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lrc.checkpoints.run_directory import STATE_FILE, newest_checkpoint
from megatron_lrc.config import ConfigError, ModelShape
from megatron_lrc.hf.checkpoint_reader import RECORD_FILE, open_teacher
from megatron_lrc.hf.comparison import Difference, compare_logits, find_difference
from megatron_lrc.hf.families import TeacherDescription, describe_teacher
from megatron_lrc.hf.forward import HuggingFaceModel, fixed_tokens
from megatron_lrc.hf.rope import rotations
from megatron_lrc.hf.student_weights import StudentWeights
from megatron_lrc.hf.teacher_identity import read_everything, warn_of_samples
from megatron_lrc.verify.weight_streams import WeightOf, open_student, stream_logits, stream_weights

#: (tokens [b, s], dtype of the arithmetic, dtype that weights are rounded to first or None) -> logits [b, s, v]
Logits = Callable[[Tensor, torch.dtype, torch.dtype | None], Tensor]


@dataclass(frozen=True)
class OpenModel:
    """A model of any kind. kind: what it is, in words. is_exact: its weights are computed, not yet rounded."""

    path: Path
    kind: str
    shape: ModelShape | HuggingFaceModel  # of which only three sizes are looked at
    weights_dtype: torch.dtype
    logits: Logits
    is_exact: bool = False

    def __str__(self) -> str:
        dtype, shape = str(self.weights_dtype).removeprefix("torch."), self.shape
        return (
            f"{self.path}: {self.kind}, {shape.num_layers} layers, hidden size {shape.hidden_size}, vocabulary "
            f"{shape.vocab_size}, weights in {dtype}"
        )


def open_model(path: Path, teacher: str | None = None) -> OpenModel:
    """The model at this path: a Hugging Face directory, a converted one, a checkpoint, or a run's newest checkpoint.

    teacher: where a checkpoint's teacher is now, if not where it was in the training.
    """
    if (path / RECORD_FILE).is_file():
        return _open_converted(path)
    if (path / "config.json").is_file():
        return _open_hugging_face(path)
    if (path / STATE_FILE).is_file() or newest_checkpoint(str(path)) is not None:
        return _open_checkpoint(path, teacher)
    raise ConfigError(
        f"{path} {'holds' if path.is_dir() else 'is'} no model. A Hugging Face directory (config.json and "
        "safetensors), one that tools/convert_from_hf.py wrote, a run directory, or a checkpoint of it (iter_NNNNNNN "
        f"with {STATE_FILE}) is expected."
    )


def _open_converted(path: Path) -> OpenModel:
    description = describe_teacher(path)
    reader = open_teacher(description)
    fingerprint = reader.fingerprint(read_everything(reader))  # refuses what is not what the conversion wrote
    for line in warn_of_samples(fingerprint, None, None, reader):
        print(f"warning: {line}", file=sys.stderr)
    kind = f"{description.family.name}, converted for megatron-core"
    logits = _streamed(lambda: reader.weight, description.shape, description)
    return OpenModel(path, kind, description.shape, reader.norm("final").dtype, logits)


def _open_hugging_face(path: Path) -> OpenModel:
    model = HuggingFaceModel(path)
    return OpenModel(path, model.architecture, model, model.weights_dtype, model.logits)


def _open_checkpoint(path: Path, teacher: str | None) -> OpenModel:
    student, description = open_student(str(path), teacher)
    family, step = description.family.name, student.state.step
    kind = f"{family} trained for {step} steps, for megatron-core"
    if student.is_composed:
        kind = f"student of a {family}, step {step}, composed for megatron-core"
    logits = _streamed(lambda: StudentWeights.of(student, description), student.shape, description)
    return OpenModel(student.path, kind, student.shape, student.dtype, logits, is_exact=True)


def _streamed(opened: Callable[[], WeightOf], shape: ModelShape, base: TeacherDescription) -> Logits:
    """By megatron-core's layers. opened: gives what gives each weight. base: whose RoPE it is."""

    def logits(tokens: Tensor, dtype: torch.dtype, rounded_to: torch.dtype | None) -> Tensor:
        weights = stream_weights(base.family, shape, opened())
        return stream_logits(weights, shape, rotations(base, tokens.shape[1]), tokens, dtype, rounded_to)

    return logits


def rounding_of(model: OpenModel, other: OpenModel) -> torch.dtype | None:
    """What a model's weights are rounded to in a comparison: composed ones to what the other's files hold, as an export
    rounds them; those of files stay."""
    return other.weights_dtype if model.is_exact and not other.is_exact else None


def compare_models(first: OpenModel, second: OpenModel, *, dtype: torch.dtype) -> Difference:
    """Of their logits of `fixed_tokens`, computed in `dtype`. ConfigError where their vocabularies differ in size."""
    sizes = first.shape.vocab_size, second.shape.vocab_size
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{first.path} has a vocabulary of {sizes[0]} and {second.path} one of {sizes[1]}, so their logits "
            "cannot be compared. Two models of one vocabulary are expected."
        )
    tokens = fixed_tokens(first.shape.vocab_size)
    return compare_logits(
        first.logits(tokens, dtype, rounding_of(first, second)),
        second.logits(tokens, dtype, rounding_of(second, first)),
    )


def check_conversion(source: Path, result: Path, weights_dtype: torch.dtype | None = None) -> None:
    """Hold a converted teacher's logits, by megatron-core, against those of `source`, by transformers.

    Prints the largest difference; ConfigError if it is more than rounding. source: the Hugging Face directory.

    weights_dtype: what the conversion rounded all weights to, if it did.
    """
    converted, original = open_model(result), HuggingFaceModel(source)
    tokens = fixed_tokens(converted.shape.vocab_size)
    expected = original.logits(tokens, torch.float32, weights_dtype)
    found = converted.logits(tokens, torch.float32, None)
    if (difference := find_difference(source, found, expected, weights_dtype)) is not None:
        raise ConfigError(
            f"The converted model fails its self-check: its logits in megatron-core are not those of {source} in "
            f"transformers: {difference}. Nothing was kept."
        )
