"""Scores a run's checkpoints while it trains, in a process of its own: `evaluate --watch RUN`.

    RUN/evaluations.jsonl    a line for each checkpoint: step, tokens, held-out figures, scores of tasks

Of the run it reads checkpoints and changes nothing. One that retention removes under its hands is passed over. What is
known of a checkpoint is its step and the CRC-32 in its run.json, so that one which a restarted run writes anew with
other contents is scored anew.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_lrc.checkpoints.run_directory import (
    STATE_FILE,
    checkpoints,
    find_changed,
    find_missing,
    read_state,
    step_of,
)
from megatron_lrc.config import ConfigError
from megatron_lrc.evaluation.evaluate import EvaluationOptions, Report, check_options, evaluate
from megatron_lrc.json_files import parse_json, read_object
from megatron_lrc.locks import FileLock
from megatron_lrc.methods import method_of
from megatron_lrc.whole_files import write_whole

EVALUATIONS_FILE = "evaluations.jsonl"  # report/run_files.py reads it
LOCK_FILE = ".evaluations.lock"
Key = tuple[int, int | None]  # step and CRC-32 of a checkpoint


def watch(
    options: EvaluationOptions, report: Report, *, seconds: float, wait: Callable[[float], object] = time.sleep
) -> None:
    """Score every checkpoint of a run, the oldest first, until its last one is scored.

    options: with the run directory as the model. seconds: between two looks at the run, which need not have begun.
    ConfigError for options that no checkpoint could be scored with. wait: for tests.
    """
    check_options(options)
    if (options.model / STATE_FILE).is_file():
        raise ConfigError(f"--watch {options.model} is a checkpoint. Give the run directory that it lies in.")
    while not options.model.is_dir():
        wait(seconds)
    failed: set[Key] = set()
    with FileLock(
        options.model / LOCK_FILE,
        place=str(options.model / EVALUATIONS_FILE),
        remedy="One watching process is enough for a run: wait until it has ended, or stop it.",
    ):
        while True:
            for path, key in list(_new_ones(options.model, failed)):
                if not _score(options, path, key, report):
                    failed.add(key)
            if is_finished(options.model) and not list(_new_ones(options.model, failed)):
                report(f"{options.model}: its last checkpoint is scored, in {options.model / EVALUATIONS_FILE}")
                return
            wait(seconds)


def _new_ones(run: Path, failed: set[Key]) -> Iterator[tuple[Path, Key]]:
    """Checkpoints that are there and not scored, the oldest first."""
    known = failed | {(record.get("step"), record.get("crc32")) for record in read_evaluations(run)}
    for path in reversed(checkpoints(run)):
        key = _key_of(path)
        if key is not None and key not in known:
            yield path, key


def _key_of(checkpoint: Path) -> Key | None:
    """None where it is gone, or cannot be read."""
    try:
        crc32 = read_object(checkpoint / STATE_FILE).get("crc32")
    except (OSError, ValueError):
        return None
    return step_of(checkpoint), crc32 if isinstance(crc32, int) else None


def _score(options: EvaluationOptions, checkpoint: Path, key: Key, report: Report) -> bool:
    """Whether it could be: a checkpoint that is gone, damaged or without a student is passed over, in a line."""
    try:
        state, config, _ = read_state(checkpoint)
        refusal = method_of(config).why_no_student(checkpoint, state.step, state.changed_at)
        if refusal is None:
            found = evaluate(replace(options, model=checkpoint, output=None), report)
    except Exception:  # torch, safetensors and the file system each have their own for a file that is gone
        refusal = _damage_of(checkpoint)
        if refusal is None:
            raise
    if refusal is not None:
        report(f"{checkpoint} is passed over: {refusal}")
        return False
    record: dict[str, Any] = {"step": key[0], "tokens": state.tokens, "crc32": key[1]}
    if "heldout" in found:
        record["heldout"] = found["heldout"]["figures"]
    if "tasks" in found:
        names = ("scores", "stderr", "bits_per_byte", "bits_per_byte_stderr", "rows", "metrics", "num_fewshot", "limit")
        record["tasks"] = {name: found["tasks"][name] for name in names}
    record["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_evaluations(options.model, [*read_evaluations(options.model), record])
    return True


def _damage_of(checkpoint: Path) -> str | None:
    """In a few words; None of one that is whole."""
    return (find_missing(checkpoint) or find_changed(checkpoint)) if checkpoint.is_dir() else "it was removed meanwhile"


def is_finished(run: Path) -> bool:
    """Whether the newest checkpoint is that of the run's last step."""
    for checkpoint in checkpoints(run)[:1]:
        try:
            state, config, _ = read_state(checkpoint)
        except ConfigError:  # removed between the two looks
            return False
        return bool(config.training.train_iters) and state.step >= (config.training.train_iters or 0)
    return False


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """The records that are whole, in the order of the file; none where there is no file."""
    try:
        lines = (run / EVALUATIONS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [record for record in map(_parsed, lines) if record is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and all(isinstance(record.get(name, 0), int) for name in ("step", "crc32"))
    return record if is_record else None


def write_evaluations(run: Path, records: list[dict[str, Any]]) -> None:
    """The file whole, in the order of steps; of a step that was scored again the newer record."""
    by_step = {record.get("step"): record for record in records}
    lines = [json.dumps(by_step[step], allow_nan=False) + "\n" for step in sorted(by_step, key=lambda s: s or 0)]
    write_whole(run / EVALUATIONS_FILE, "".join(lines))
