"""What can be refused before a process group or a model exists: the teacher, the data, the run directories."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from megatron_lrc.checkpoints.run_directory import RunState, read_state
from megatron_lrc.config import (
    Config,
    ConfigError,
    budgets_of,
    check_schedule,
    describe_budgets,
    is_counted,
    raise_all,
    validate_against_teacher,
)
from megatron_lrc.data.data_checks import check_data
from megatron_lrc.data.datasets import resolve_train_iters
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import TeacherDescription, describe_teacher
from megatron_lrc.hf.reader import Reader
from megatron_lrc.mcore.gpt_models import check_pipeline_layout
from megatron_lrc.methods import Method, method_of
from megatron_lrc.methods.ordinary.initial_weights import InitialWeights
from megatron_lrc.train.boards import check_boards
from megatron_lrc.train.checkpoint_checks import check_fits, find_checkpoint, find_weights, fingerprint


@dataclass(frozen=True, slots=True)
class Checked:
    """What the checks have opened. teacher: without one the model that the student is, or has the config.json of."""

    config: Config  # its budget counted in steps
    teacher: TeacherDescription
    reader: Reader
    resume_from: Path | None
    weights_from: Path | None  # of a run that starts: another one's checkpoint
    state: RunState  # of the checkpoint that is continued, or of a run that starts
    warnings: list[str]


def check(config: Config, world_size: int, damaged: Mapping[Path, str] = MappingProxyType({})) -> Checked:
    """Everything that can be refused before a process group or a model exists; alike on every rank.

    damaged: checkpoints whose contents have been looked at, and what is wrong with them; they are passed over.
    """
    method = method_of(config)
    check_boards(config)
    teacher, reader = _open_base(method)
    warnings = validate_against_teacher(method, teacher.shape)
    check_pipeline_layout(config, teacher.shape)
    check_data(config, teacher.shape.vocab_size)
    if config.checkpoint.save:
        _check_writable(Path(config.checkpoint.save))
    resume_from, passed_over = find_checkpoint(config, damaged)
    warnings += passed_over
    if resume_from:
        state = check_fits(resume_from, method, reader)
    else:
        state = RunState(teacher_fingerprint=fingerprint(method, reader))
    weights_from = None if resume_from else find_weights(method, reader)
    config = resolve_train_iters(
        config, step=state.step, consumed_samples=state.consumed_samples, consumed_tokens=state.tokens
    )
    if is_counted(config.training):  # only now are its steps known
        raise_all(list(check_schedule(config)))
    if resume_from:
        _check_not_past(config, resume_from, state)
    return Checked(config, teacher, reader, resume_from, weights_from, state, warnings)


def _check_not_past(config: Config, checkpoint: Path, state: RunState) -> None:
    """Refuse a budget that was used up before the checkpoint's last step: another one is meant. That step may have
    gone past it, being whole."""
    training, before = config.training, read_state(checkpoint)[1].training
    budget = budgets_of(training) if not is_counted(training) else budgets_of(replace(training, train_iters=None))
    last = before.global_batch_size or 0
    begun = {
        "train_iters": state.step,
        "train_samples": state.consumed_samples - last + 1,
        "train_tokens": state.tokens - last * before.seq_length + 1,
    }
    for name, value in budget.items():
        if begun.get(name, 0) > value:
            raise ConfigError(
                f"{checkpoint} is past {describe_budgets({name: value})}. Use a larger one to train further."
            )


def _open_base(method: Method) -> tuple[TeacherDescription, Reader]:
    """The model that --student or --teacher names, and its weights; those to begin with where only its shape counts."""
    config = method.config
    assert config.base_model is not None, "validate() has passed"
    base = describe_teacher(config.base_model, needs_weights=not method.starts_anew, role=config.base_role)
    if not method.starts_anew:
        return base, open_teacher(base)
    shape, std = method.student_shape(base.shape), config.projection.init_method_std
    return base, InitialWeights(base, shape, std=std, seed=config.training.seed)


def _check_writable(run: Path) -> None:
    """Refuse a run directory that could not be made or written to, before hours are spent on what it should hold."""
    existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "is not writable" if existing.is_dir() else "is a file"
        raise ConfigError(f"--save {run}: {existing} {why}. Give a directory that can be made and written to.")
