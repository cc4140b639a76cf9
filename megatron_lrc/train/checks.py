"""What can be refused before a process group or a model exists: the teacher, the data, the run directories."""

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_lrc.config import Config, ConfigError, ModelShape
from megatron_lrc.data.batches import check_data
from megatron_lrc.data.datasets import resolve_train_iters
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import TeacherDescription, describe_teacher
from megatron_lrc.hf.reader import Reader
from megatron_lrc.mcore.checkpoint import RunState, newest_checkpoint, read_state
from megatron_lrc.mcore.models import check_pipeline_layout
from megatron_lrc.validation import check_schedule, raise_all, validate_against_teacher

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, slots=True)
class Checked:
    """What the checks have opened."""

    config: Config  # with the --train-iters that --train-epochs comes to
    teacher: TeacherDescription
    reader: Reader
    resume_from: Path | None
    state: RunState  # of that checkpoint, or of a run that starts
    warnings: list[str]


def check(config: Config, world_size: int) -> Checked:
    """Everything that can be refused before a process group or a model exists; alike on every rank."""
    assert config.model.teacher is not None, "validate() has passed"
    teacher = describe_teacher(config.model.teacher)
    warnings = validate_against_teacher(config, teacher.shape)
    reader = open_teacher(teacher)
    check_pipeline_layout(config, teacher.shape)
    check_data(config, teacher.shape.vocab_size)
    if config.checkpoint.save:
        _check_writable(Path(config.checkpoint.save))
    resume_from, state = _find_checkpoint(config, teacher, reader)
    config = resolve_train_iters(config, step=state.step, consumed_samples=state.consumed_samples)
    if config.training.train_epochs:  # only now are its steps known
        raise_all(list(check_schedule(config)))
    if state.step > config.training.train_iters:
        raise ConfigError(
            f"{resume_from} is past --train-iters {config.training.train_iters}. Use a larger one to train further."
        )
    return Checked(config, teacher, reader, resume_from, state, warnings)


def _check_writable(run: Path) -> None:
    """Refuse a run directory that could not be made or written to, before hours are spent on what it should hold."""
    existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "is not writable" if existing.is_dir() else "is a file"
        raise ConfigError(f"--save {run}: {existing} {why}. Give a directory that can be made and written to.")


def _find_checkpoint(config: Config, teacher: TeacherDescription, reader: Reader) -> tuple[Path | None, RunState]:
    """The checkpoint of --load and its state, if it is of this teacher and student; refuses to write over another run.

    The training data may be another one: the run says so, and keeps its position (`loop.py`).
    """
    save, load = config.checkpoint.save, config.checkpoint.load
    if save and newest_checkpoint(save) and (not load or Path(load).resolve() != Path(save).resolve()):
        raise ConfigError(
            f"--save {save} already holds checkpoints of a run. Add --load {save} to continue it, or save elsewhere."
        )
    if not load:
        return None, RunState(teacher_fingerprint=reader.fingerprint())
    path = newest_checkpoint(load)
    if path is None:
        raise ConfigError(f"--load {load} holds no complete checkpoint. Leave it out to start anew.")
    state, _, saved = read_state(path)
    wanted: ModelShape = config.student_shape(teacher.shape)
    if state.teacher_fingerprint != reader.fingerprint():
        raise ConfigError(
            f"--teacher {config.model.teacher} is not the teacher that {path} was trained with: its files differ. "
            "Give that teacher's directory."
        )
    if saved != wanted:
        raise ConfigError(
            f"{path} holds a student of hidden size {saved.hidden_size}, {describe_tying(saved)}; the flags ask for "
            f"{wanted.hidden_size}, {describe_tying(wanted)}. Repeat --student-hidden-size, --init and "
            f"--untie-embeddings-and-output-weights as they were, or give --config {Path(load) / CONFIG_FILE}."
        )
    return path, state


def describe_tying(shape: ModelShape) -> str:
    return "tied" if shape.is_tied else "untied"
