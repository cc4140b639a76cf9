"""The checkpoints of a run directory as files: which there are, whether they are whole, how one comes and goes.

    RUN/iter_0000100/            appears under this name only when complete, on disk and read back
        *.distcp, .metadata ...  what megatron-core wrote (`mcore/checkpoint.py`)
        run.json                 counters, configuration, student's shape; size and CRC-32 of every other file, and the
                                 CRC-32 of its own values

Nothing here needs a process group. Names that other processes must not take for a checkpoint end in .partial-TOKEN (it
is being written), .replaced (the step is saved once more) or .removed (retention), so whatever moment a process dies
at, each step is there whole or not at all. `remove_leftovers` tidies up after such a death.
"""

import json
import os
import re
import shutil
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from megatron_lrc import __version__
from megatron_lrc.checkpoints.files import FileSum
from megatron_lrc.config import CheckpointConfig, Config, ConfigError, ModelShape, check_kinds
from megatron_lrc.json_files import read_object
from megatron_lrc.plain_files import file_beside

STATE_FILE = "run.json"
AUTO = "auto"  # --load: the newest checkpoint of --save
_THREADS_READING = 4
_CHECKPOINT = re.compile(r"iter_(\d{7,})")
_LEFTOVER = re.compile(r"(iter_\d{7,})\.(partial-\w+|replaced|removed)")


@dataclass(slots=True)
class RunState:
    """Where a run stands. `consumed_samples` is its position in the order of samples, which the flags alone decide.

    There is no random state in it: a step draws no random numbers, and the order of samples follows from --seed.
    """

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    data_order: str = ""  # hash over what decides that order (`data/sample_order.py`); not known to older checkpoints
    teacher_fingerprint: str = ""
    tokenizer_fingerprint: str = ""  # of the data; "" where no manifest names it
    tokens_that_count: str = "all"  # in the losses: "all", or of chats the "assistant"'s (`data/counted_tokens.py`)
    grad_norm_mean: float = 0.0  # running mean over the steps taken, for --spike-factor
    grad_norm_count: int = 0
    changed_at: int | None = None  # the step after which the method changed what is trained (`Method.change`)
    has_least_warmup: bool = True  # whether the default warmup has a minimum; it had none in older checkpoints


# ------------------------------------------------------------------------------------------------ what there is


def checkpoint_path(run: str | Path, step: int) -> Path:
    return Path(run) / f"iter_{step:07d}"


def step_of(checkpoint: Path) -> int:
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run directory, newest first. None where there is no such directory."""
    found = [path for path in Path(run).glob("iter_*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in found if (path / STATE_FILE).is_file()), key=step_of, reverse=True)


def newest_checkpoint(run: str | Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    return next(iter(checkpoints(run)), None)


def checkpoints_to_load(config: CheckpointConfig) -> list[Path]:
    """What --load may mean, best first: a run's checkpoints, with `auto` those of --save, or the one that it names."""
    if not config.load:
        return []
    if config.load == AUTO:
        return checkpoints(config.save or "")
    return [Path(config.load)] if (Path(config.load) / STATE_FILE).is_file() else checkpoints(config.load)


def read_state(path: Path) -> tuple[RunState, Config, ModelShape]:
    """run.json of a checkpoint: counters, the configuration it was trained with, the student's shape."""
    try:
        values = _read_record(path)
        state, config = RunState(**with_names_of_today(values["state"])), Config.from_dict(values["config"])
        shape = ModelShape(**values["student_shape"])
        for one in (state, shape):
            _check_kinds(one)
        check_kinds(config)
        return state, config, shape
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path / STATE_FILE} cannot be read ({error}): written by another version, or damaged. "
            "Use a checkpoint of this version of megatron_lrc, or an older one of the same run."
        ) from None


def _check_kinds(values: RunState | ModelShape | FileSum) -> None:
    """TypeError unless every field is of the kind that it is declared as."""
    for one in fields(values):
        if not _is_of_kind(getattr(values, one.name), one.type):
            raise TypeError(f"{one.name} is of another kind")


def _is_of_kind(value: Any, declared: Any) -> bool:
    origin, arguments = get_origin(declared), get_args(declared)
    if origin is tuple:  # of any length
        return isinstance(value, tuple) and all(_is_of_kind(item, arguments[0]) for item in value)
    if origin is Literal:
        return value in arguments
    return isinstance(value, (int, float) if declared is float else declared)


def with_names_of_today(state: dict[str, Any]) -> dict[str, Any]:
    """Older checkpoints had a name for each method's change, of which a run can have one; now it is `changed_at`. And
    what they do not say of the default warmup is that it had no minimum then."""
    older = [state.pop(name, None) for name in ("opened_at", "pruned_at")]
    changed_at = next((step for step in older if step is not None), None)
    return {"changed_at": changed_at, "has_least_warmup": False, **state}


def _read_record(path: Path) -> dict[str, Any]:
    return read_object(path / STATE_FILE)


# ------------------------------------------------------------------------------------------------ whether it is whole


def find_missing(path: Path) -> str | None:
    """What a look at run.json and the files' sizes finds wrong with a checkpoint, in a few words."""
    try:
        record = _read_record(path)
        if record.get("crc32", _crc32_of(record)) != _crc32_of(record):
            return f"{STATE_FILE} is not what was written"
        for name, expected in _sums(record).items():
            size = file_beside(path, name).stat().st_size
            if size != expected.size:
                return f"{name} has {size} bytes, not {expected.size}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE_FILE} cannot be read: {error}"
    return None


def find_changed(path: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """The first file whose contents are not what was written, in a few words. Reads one of `parts` shares of them."""

    def damage_of(entry: tuple[str, FileSum]) -> str | None:
        name, expected = entry
        try:
            found = FileSum.of(file_beside(path, name))
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != expected:
            return f"{name} is not what was written: CRC-32 {found.crc32:08x}, not {expected.crc32:08x}"
        return None

    files = sorted(_sums(_read_record(path)).items())[part::parts]
    with ThreadPoolExecutor(_THREADS_READING) as threads:  # reading and summing let go of the interpreter
        return next(filter(None, threads.map(damage_of, files)), None)


def _crc32_of(record: dict[str, Any]) -> int:
    """Of all of run.json but this sum: with a bit flipped it is often still valid, but another number is in it."""
    others = {name: value for name, value in record.items() if name != "crc32"}
    return zlib.crc32(json.dumps(others, sort_keys=True).encode())


def _sums(record: dict[str, Any]) -> dict[str, FileSum]:
    """TypeError, KeyError, AttributeError where there is no such list."""
    sums = {name: FileSum(**values) for name, values in record["files"].items()}
    for found in sums.values():
        _check_kinds(found)
    return sums


# ------------------------------------------------------------------------------------------------ coming and going


def partial_path(final: Path, token: str) -> Path:
    """Where a checkpoint is written. `token` keeps apart what an earlier attempt's orphans may still write."""
    return final.with_name(f"{final.name}.partial-{token}")


def publish(
    partial: Path, final: Path, state: RunState, config: Config, shape: ModelShape, sums: dict[str, FileSum]
) -> None:
    """Write run.json beside the files of a checkpoint and give the folder its final name. OSError where that fails.

    sums: of files that were summed when they were written and read; the others are summed here.
    """
    others = {path.name: FileSum.of(path) for path in partial.iterdir() if path.name not in sums}
    values = {
        "megatron_lrc": __version__,
        "state": asdict(state),
        "student_shape": asdict(shape),
        "config": config.to_dict(),
        "files": {name: asdict(found) for name, found in sorted((sums | others).items())},
    }
    values["crc32"] = _crc32_of(values)
    (partial / STATE_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    for path in (*(partial / name for name in (*others, STATE_FILE)), partial):
        _flush(path)
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():  # a run that fell back past a damaged checkpoint comes by its step again
        os.replace(final, replaced)
    os.replace(partial, final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_old(run: str | Path, newest: int, *, keep_last: int | None, retain_interval: int | None) -> list[Path]:
    """Remove checkpoints before step `newest`, which is good, but the `keep_last` newest ones (it counts) and those
    whose step `retain_interval` divides; nothing where both are None. What was removed."""
    if keep_last is None and retain_interval is None:
        return []
    # Later ones are not counted: the run has passed over them, so they are damaged.
    old = [path for path in checkpoints(run) if step_of(path) <= newest][keep_last or 1 :]
    removed = [path for path in old if retain_interval is None or step_of(path) % retain_interval]
    gone = [path.with_name(path.name + ".removed") for path in removed]
    for path, new_path in zip(removed, gone, strict=True):
        os.replace(path, new_path)  # so that a half-removed one is never taken for a checkpoint
    # Freeing gigabytes takes a while, which the run need not wait.
    threading.Thread(target=_remove, args=(gone,), name="retention").start()
    return removed


def _remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(run: str | Path) -> None:
    """Tidy up what died with an earlier process. Only when nobody else writes to the run."""
    for path in Path(run).glob("iter_*.*"):
        match = _LEFTOVER.fullmatch(path.name)
        if not match:
            continue
        final = path.with_name(match[1])
        if match[2] == "replaced" and not final.exists():
            with suppress(OSError):  # read-only now
                os.replace(path, final)  # its successor never got the name
        else:
            shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    """Onto the disk: a file's contents, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
