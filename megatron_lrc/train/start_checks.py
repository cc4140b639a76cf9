"""What can be refused before a process group or a model exists: the teacher, the data, the run directories."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megatron_lrc.checkpoints.run_directory import (
    AUTO,
    STATE_FILE,
    RunState,
    checkpoints,
    checkpoints_to_load,
    find_missing,
    newest_checkpoint,
    read_state,
    step_of,
)
from megatron_lrc.config import Config, ConfigError, ModelShape, check_schedule, raise_all, validate_against_teacher
from megatron_lrc.data.data_checks import check_data
from megatron_lrc.data.datasets import resolve_train_iters
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import TeacherDescription, describe_teacher
from megatron_lrc.hf.reader import Reader
from megatron_lrc.mcore.gpt_models import check_pipeline_layout
from megatron_lrc.methods.ordinary.initial_weights import InitialWeights
from megatron_lrc.train.boards import check_boards

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, slots=True)
class Checked:
    """What the checks have opened. teacher: without one the model that the student is, or has the config.json of."""

    config: Config  # with the --train-iters that --train-epochs comes to
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
    check_boards(config)
    teacher, reader = _open_base(config)
    warnings = validate_against_teacher(config, teacher.shape)
    check_pipeline_layout(config, teacher.shape)
    check_data(config, teacher.shape.vocab_size)
    if config.checkpoint.save:
        _check_writable(Path(config.checkpoint.save))
    resume_from, passed_over = _find_checkpoint(config, damaged)
    warnings += passed_over
    if resume_from:
        state = _check_fits(resume_from, config, teacher, reader)
    else:
        state = RunState(teacher_fingerprint=_fingerprint(config, reader))
    weights_from = None if resume_from else _find_weights(config, teacher, reader)
    config = resolve_train_iters(config, step=state.step, consumed_samples=state.consumed_samples)
    if config.training.train_epochs:  # only now are its steps known
        raise_all(list(check_schedule(config)))
    if state.step > config.training.train_iters:
        raise ConfigError(
            f"{resume_from} is past --train-iters {config.training.train_iters}. Use a larger one to train further."
        )
    return Checked(config, teacher, reader, resume_from, weights_from, state, warnings)


def _open_base(config: Config) -> tuple[TeacherDescription, Reader]:
    """The model that --student or --teacher names, and its weights; those to begin with where only its shape counts."""
    assert config.base_model is not None, "validate() has passed"
    is_new = config.model.method == "ordinary" and config.model.student is None
    base = describe_teacher(config.base_model, needs_weights=not is_new, role=config.base_role)
    if not is_new:
        return base, open_teacher(base)
    shape = config.student_shape(base.shape)
    return base, InitialWeights(base, shape, std=config.projection.init_method_std, seed=config.training.seed)


def _fingerprint(config: Config, reader: Reader) -> str:
    """Of what a checkpoint cannot do without: the teacher, or config.json alone, since the weights are in it."""
    return reader.fingerprint() if config.has_teacher else reader.description.config_fingerprint


def _check_writable(run: Path) -> None:
    """Refuse a run directory that could not be made or written to, before hours are spent on what it should hold."""
    existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "is not writable" if existing.is_dir() else "is a file"
        raise ConfigError(f"--save {run}: {existing} {why}. Give a directory that can be made and written to.")


def _find_checkpoint(config: Config, damaged: Mapping[Path, str]) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint that --load means, and a warning for each that was passed over.

    Refuses to write over another run, or over what is newer than the checkpoint it is to continue.
    """
    save, load = config.checkpoint.save, config.checkpoint.load
    candidates = checkpoints_to_load(config.checkpoint)
    if save and (newest := newest_checkpoint(save)) and load != AUTO:
        if not load or newest.parent.resolve() not in (Path(load).resolve(), Path(load).resolve().parent):
            raise ConfigError(
                f"--save {save} already holds checkpoints of a run. Add --load auto to continue it, or save elsewhere."
            )
        if len(candidates) == 1 and step_of(candidates[0]) < step_of(newest):
            raise ConfigError(
                f"--save {save} holds {newest.name}, which is newer than --load {load}. Save elsewhere, or move the "
                "newer checkpoints away."
            )
    found: dict[Path, str] = {}
    for path in candidates:
        damage = damaged.get(path) or find_missing(path)
        if damage is None:
            return path, [f"{other} is damaged ({what}) and passed over" for other, what in found.items()]
        found[path] = damage
    if found:
        whats = "; ".join(f"{path.name}: {what}" for path, what in found.items())
        raise ConfigError(
            f"--load {load}: every checkpoint is damaged ({whats}). Move them away to start anew, or mend the disk."
        )
    if load and load != AUTO:
        raise ConfigError(f"--load {load} holds no complete checkpoint. Leave it out to start anew.")
    return None, []


def _find_weights(config: Config, teacher: TeacherDescription, reader: Reader) -> Path | None:
    """The checkpoint that --pretrained-checkpoint means; nothing of it but the weights matters."""
    given = config.checkpoint.pretrained_checkpoint
    if not given:
        return None
    found = [Path(given)] if (Path(given) / STATE_FILE).is_file() else checkpoints(given)
    if not found:
        raise ConfigError(f"--pretrained-checkpoint {given} holds no complete checkpoint. Give a run directory.")
    if damage := find_missing(found[0]):
        raise ConfigError(f"{found[0]} is damaged ({damage}). Give an older checkpoint of that run.")
    state = _check_fits(found[0], config, teacher, reader)
    if state.opened_at is not None:
        raise ConfigError(
            f"--pretrained-checkpoint {found[0]} holds a student that was opened after step {state.opened_at}: it has "
            "matrices that no projection makes, and cannot start another clone. Continue that run with --load, or "
            "export it with tools/convert_to_hf.py and train the result with --method ordinary --student."
        )
    return found[0]


def _check_fits(path: Path, config: Config, teacher: TeacherDescription, reader: Reader) -> RunState:
    """The state of a checkpoint, if it is of this teacher and student.

    The training data may be another one: the run says so, and keeps its position (`loop.py`).
    """
    state, config_before, saved = read_state(path)
    wanted: ModelShape = config.trained_shape(teacher.shape, is_pruned=state.pruned_at is not None)
    if config_before.model.method != config.model.method:
        raise ConfigError(
            f"{path} is of a run with --method {config_before.model.method}, and cannot be continued with --method "
            f"{config.model.method}. Repeat that, or export it with tools/convert_to_hf.py and start from the result."
        )
    if state.teacher_fingerprint != _fingerprint(config, reader):
        if not config.has_teacher:
            raise ConfigError(
                f"{config.base_model} is not the model that {path} was trained from: its config.json differs. Give "
                "that model's directory."
            )
        raise ConfigError(
            f"--teacher {config.model.teacher} is not the teacher that {path} was trained with: its files differ. "
            "Give that teacher's directory."
        )
    if config.is_sheared and config_before.student_shape(teacher.shape) != config.student_shape(teacher.shape):
        raise ConfigError(
            f"{path} has been pruned for another shape than the flags ask for. Repeat --student-hidden-size, "
            f"--pruned-num-query-groups and --pruned-ffn-hidden-size as they were, or give --config "
            f"{path.parent / CONFIG_FILE}."
        )
    if saved != wanted:
        raise ConfigError(
            f"{path} holds a student of hidden size {saved.hidden_size}, {describe_tying(saved)}; the flags ask for "
            f"{wanted.hidden_size}, {describe_tying(wanted)}. Repeat --student-hidden-size, --init and "
            f"--untie-embeddings-and-output-weights as they were, or give --config {path.parent / CONFIG_FILE}."
        )
    if state.opened_at is not None:
        before, now = config_before.projection, config.projection
        if now.open_after is None or now.open_matrices != before.open_matrices:
            raise ConfigError(
                f"{path} holds a student that was opened after step {state.opened_at}, and stays so. Repeat "
                f"--open-after {before.open_after:g} and --open-matrices {before.open_matrices}."
            )
    return state


def describe_tying(shape: ModelShape) -> str:
    return "tied" if shape.is_tied else "untied"
