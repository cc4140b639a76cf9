"""Which checkpoint a run goes on from, and whether its teacher and flags are those of the run that wrote it."""

from collections.abc import Mapping
from pathlib import Path

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
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.data.counted_tokens import ASSISTANT
from megatron_lrc.hf.reader import Contents, Reader
from megatron_lrc.hf.teacher_identity import is_same_teacher, why_not_comparable
from megatron_lrc.methods import Method, method_of
from megatron_lrc.methods.method import describe_size

CONFIG_FILE = "config.yaml"


def find_checkpoint(config: Config, damaged: Mapping[Path, str]) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint that --load means, and a warning for each that was passed over. Refuses to
    write over another run, or over what is newer than the checkpoint it is to continue."""
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


def find_weights(config: Config) -> Path | None:
    """The checkpoint that --pretrained-checkpoint means; nothing of it but the weights matters."""
    given = config.checkpoint.pretrained_checkpoint
    if not given:
        return None
    found = [Path(given)] if (Path(given) / STATE_FILE).is_file() else checkpoints(given)
    if not found:
        raise ConfigError(f"--pretrained-checkpoint {given} holds no complete checkpoint. Give a run directory.")
    if damage := find_missing(found[0]):
        raise ConfigError(f"{found[0]} is damaged ({damage}). Give an older checkpoint of that run.")
    return found[0]


def check_method(path: Path, method: Method) -> RunState:
    """The state of a checkpoint, if it is of this method. What it was trained with is not looked at yet."""
    state, config_before, _ = read_state(path)
    if config_before.model.method != method.name:
        raise ConfigError(
            f"{path} is of a run with --method {config_before.model.method}, and cannot be continued with --method "
            f"{method.name}. Repeat that, or export it with tools/convert_to_hf.py and start from the result."
        )
    return state


def check_tokens_that_count(path: Path, state: RunState, counted: str) -> None:
    """ConfigError where a run would go on with other losses. counted: what `which_tokens_count` says of its data."""
    if state.tokens_that_count == counted:
        return
    if counted == ASSISTANT:
        raise ConfigError(
            f"{path} was trained with losses on every token, and of the data given now only the assistant's tokens "
            "count. Go on as before with --train-on-inputs, or start a new run from its student: with "
            f"--pretrained-checkpoint {path}, or tools/convert_to_hf.py and --method ordinary --student."
        )
    raise ConfigError(
        f"{path} was trained with losses on the assistant's tokens of chats only, and now every token would count. "
        "Leave out --train-on-inputs, and give data that says which tokens are the assistant's (PREFIX.mask)."
    )


def check_fits(path: Path, method: Method, reader: Reader, fingerprint: str) -> RunState:
    """The state of a checkpoint, if it is of this teacher and student. The training data may be another one:
    the run says so, and keeps its position (`loop.py`). fingerprint: `fingerprint_of`."""
    state, config_before, saved = read_state(path)
    config, base = method.config, reader.description.shape
    if not is_same_teacher(fingerprint, reader, state.teacher_fingerprint):
        if not method.has_teacher:
            raise ConfigError(
                f"{config.base_model} is not the model that {path} was trained from: its config.json differs. Give "
                "that model's directory."
            )
        raise ConfigError(
            f"--teacher {config.model.teacher} is not the teacher that {path} was trained with: its files differ. "
            f"Give that teacher's directory.{why_not_comparable(fingerprint, state.teacher_fingerprint)}"
        )
    before, wanted = method_of(config_before), method.shape_of_phase(base, has_changed=state.changed_at is not None)
    if refusal := method.check_continues(before, base, path=path, changed_at=state.changed_at):
        raise ConfigError(refusal)
    if saved != wanted:
        raise ConfigError(
            f"{path} holds a student of hidden size {describe_size(saved)}, norm epsilon {saved.norm_epsilon:g}; the "
            f"flags ask for {describe_size(wanted)}, {wanted.norm_epsilon:g}. Repeat --student-hidden-size, "
            "--student-layers or --student-num-layers, --student-num-query-groups, --student-ffn-hidden-size, "
            "--student-norm-epsilon, --init and --untie-embeddings-and-output-weights as they were, or give "
            f"--config {path.parent / CONFIG_FILE}."
        )
    return state


def fingerprint_of(method: Method, reader: Reader, contents: Contents) -> str:
    """Of what a checkpoint cannot do without: the teacher, or config.json alone, since the weights are in it.

    ConfigError where the files are not what was written.
    """
    found = reader.fingerprint(contents)
    return found if method.has_teacher else reader.description.config_fingerprint
