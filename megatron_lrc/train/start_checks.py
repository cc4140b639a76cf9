"""What can be refused before a process group or a model exists: the teacher, the data, the run directories."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from megatron_lrc.checkpoints.run_directory import RunState, read_state
from megatron_lrc.config import (
    DEFAULT_WARMUP_FRACTION,
    Config,
    ConfigError,
    ModelShape,
    budgets_of,
    check_schedule,
    count_steps,
    describe_budgets,
    describe_jump,
    describe_layers,
    is_counted,
    raise_all,
    validate_against_teacher,
)
from megatron_lrc.data.counted_tokens import which_tokens_count
from megatron_lrc.data.data_checks import check_data
from megatron_lrc.data.datasets import resolve_train_iters
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import TeacherDescription, describe_teacher
from megatron_lrc.hf.reader import Contents, Reader
from megatron_lrc.hf.shared_hash import Sharers, contents_at_start
from megatron_lrc.hf.student_config import student_family
from megatron_lrc.hf.teacher_identity import said_if_slow, warn_of_samples, warn_of_suspicious
from megatron_lrc.launch import torchrun
from megatron_lrc.mcore.gpt_models import check_pipeline_layout
from megatron_lrc.mcore.student_stages import check_student_stages
from megatron_lrc.methods import Method, method_of
from megatron_lrc.methods.ordinary.initial_weights import InitialWeights
from megatron_lrc.train.boards import check_boards
from megatron_lrc.train.checkpoint_checks import (
    check_fits,
    check_method,
    check_tokens_that_count,
    find_checkpoint,
    find_weights,
    fingerprint_of,
)


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
    contents: Contents = field(default_factory=dict)  # of the files of `reader`, once they have been read (`read_base`)


def check(
    config: Config,
    world_size: int,
    damaged: Mapping[Path, str] = MappingProxyType({}),
    contents: Contents | None = None,
) -> Checked:
    """`check_start`, then `check_base` with these contents, or with what this process alone reads."""
    checked = check_start(config, world_size, damaged)
    return check_base(with_contents(checked, read_base(checked) if contents is None else contents))


def check_start(config: Config, world_size: int, damaged: Mapping[Path, str] = MappingProxyType({})) -> Checked:
    """Everything that can be refused before a process group or a model exists, and without reading the teacher's
    files; alike on every rank. `check_base` is next.

    damaged: checkpoints whose contents have been looked at, and what is wrong with them; they are passed over.
    """
    method = method_of(config)
    check_boards(config)
    teacher, reader = _open_base(method)
    warnings = validate_against_teacher(method, teacher.shape)
    check_pipeline_layout(config, method.divided_shape(teacher.shape))
    student = method.student_shape(teacher.shape)
    student_family(teacher, student.hidden_size, num_heads=student.num_attention_heads)  # or it could not be exported
    if student.teacher_layers:
        check_student_stages(config, teacher.shape, student)
        config = _with_layers(config, student)
    tokenizer_fingerprint = check_data(config, teacher.shape.vocab_size)
    if config.checkpoint.save:
        warnings += _refuse_read_only(Path(config.checkpoint.save))
    resume_from, passed_over = find_checkpoint(config, damaged)
    warnings += passed_over
    state = check_method(resume_from, method) if resume_from else RunState()
    counted = which_tokens_count(config)
    if resume_from:
        check_tokens_that_count(resume_from, state, counted)
    state = replace(state, tokenizer_fingerprint=tokenizer_fingerprint, tokens_that_count=counted)
    weights_from = None if resume_from else find_weights(config)
    if weights_from:
        check_method(weights_from, method)
    elif not resume_from:
        raise_all(list(method.check_new(teacher.shape)))
    if not state.step:  # of that run there is no schedule to keep
        state = replace(state, has_least_warmup=True)
    elif not state.has_least_warmup:
        config = with_warmup_of_then(config)
    config = resolve_train_iters(
        config, step=state.step, consumed_samples=state.consumed_samples, consumed_tokens=state.tokens
    )
    if is_counted(config.training):  # only now are its steps known
        raise_all(list(check_schedule(config.optimizer, config.decay_iters or None)))
    if resume_from:
        _check_not_past(config, resume_from, state)
        warnings += warn_of_jump(config, read_state(resume_from)[1], state)
    return Checked(config, teacher, reader, resume_from, weights_from, state, warnings)


def _with_layers(config: Config, student: ModelShape) -> Config:
    """With the student's layers named, however they were chosen."""
    return replace(config, model=replace(config.model, student_layers=describe_layers(student.teacher_layers).split()))


def with_warmup_of_then(config: Config) -> Config:
    """For a run whose checkpoint is of a version without a minimum for the default warmup, which it keeps."""
    optimizer = config.optimizer
    if optimizer.lr_warmup_iters is not None or optimizer.lr_warmup_fraction is not None:
        return config
    return replace(config, optimizer=replace(optimizer, lr_warmup_fraction=DEFAULT_WARMUP_FRACTION))


def warn_of_jump(config: Config, before: Config, state: RunState) -> Iterator[str]:
    """before: what the checkpoint was trained with; nothing is said where its steps were those of epochs."""
    steps = before.training.train_iters if not is_counted(before.training) else count_steps(before.training)
    if steps and before.optimizer.lr_decay_style == "WSD":
        then = before.optimizer.lr_decay_iters or steps
        if jump := describe_jump(before.optimizer, config.optimizer, then, config.decay_iters, state.step):
            yield jump


def read_base(checked: Checked, sharers: Sharers | None = None) -> Contents:
    """What the files of the teacher hold, or of the model that a run without one begins with: every byte counts.

    Nothing where the checkpoint has all the weights. Ranks of a node share the reading; each of them has to call this.
    """
    has_weights = bool(checked.resume_from or checked.weights_from)
    is_needed = method_of(checked.config).reads_base(has_weights=has_weights)
    with said_if_slow(f"reading every byte of {checked.teacher.given}", is_on=os.environ.get("RANK", "0") == "0"):
        return contents_at_start(checked.teacher.directory, checked.reader.files if is_needed else [], sharers)


def with_contents(checked: Checked, contents: Contents) -> Checked:
    """contents: what `read_base` gave."""
    return replace(checked, contents=contents)


def check_base(checked: Checked) -> Checked:
    """With the fingerprint in its state and more warnings, if what was read and the checkpoint belong together.

    ConfigError, alike on every rank that read the same.
    """
    method, reader, contents = method_of(checked.config), checked.reader, checked.contents
    fingerprint = fingerprint_of(method, reader, contents)
    resume_from, weights_from, trained_with = checked.resume_from, checked.weights_from, None
    if checkpoint := resume_from or weights_from:
        found = check_fits(checkpoint, method, reader, fingerprint)
        trained_with = found.teacher_fingerprint
        if resume_from and (refusal := method.why_not_resumed(resume_from, read_state(resume_from)[1])):
            raise ConfigError(refusal)
        if weights_from and (refusal := method.why_no_start(weights_from, found.changed_at)):
            raise ConfigError(refusal)
    warnings = [*checked.warnings, *warn_of_suspicious(reader, contents)]
    if contents:
        warnings += warn_of_samples(reader.fingerprint(contents), trained_with, checkpoint, reader)
    return replace(checked, state=replace(checked.state, teacher_fingerprint=fingerprint), warnings=warnings)


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


def _refuse_read_only(run: Path) -> Iterator[str]:
    """Refuse a run directory that could not be made or written to, before hours are spent on what it should hold. One
    that has become so under a run that torchrun has started again is a warning: it may be mended meanwhile."""
    existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "is not writable" if existing.is_dir() else "is a file"
        refusal = f"--save {run}: {existing} {why}. Give a directory that can be made and written to."
        if not torchrun.restarts():
            raise ConfigError(refusal)
        yield refusal
