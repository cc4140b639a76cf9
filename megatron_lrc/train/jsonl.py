"""A run's .jsonl files: a record per line, in the order of steps. Imports no torch, so that tools answer at once.

A line may be cut by a crash, come from another version or another program, or be damaged. What is of the kind that its
field has is kept, the rest left out, so that whoever reads records finds numbers where numbers belong.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lrc.json_files import parse_json

_TEXTS = {"time", "warning", "checkpoint", "weights", "host"}
_MAPPINGS = {
    *("clone_by_layer", "grad_norm_by_group", "tflops", "mfu", "memory_gib", "straggler", "mask_sizes"),
    *("effective_rank", "layout", "versions", "heldout", "tasks"),
}  # all other fields are numbers, or null
_COUNTS = {"tokens", "lost_steps", "lost_seconds", "train_iters"}  # not below 0
_LARGEST = 1e100  # beyond it, the places and ticks of a chart's axis are no floats any more
_MOST_STEPS = 1 << 53  # what a float counts exactly


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records with a step, line by line; none where there is no file."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        yield from (record for record in map(_parsed, file) if record is not None)


def drop_records_after(path: Path, step: int) -> None:
    """Cut the file behind the last record up to `step`: that needs no room, and a crash loses nothing."""
    if not path.exists():
        return
    end = position = 0
    with open(path, "rb") as file:
        for line in file:
            position += len(line)
            record = _parsed(line.decode("utf-8", errors="replace"))
            if record is not None and record["step"] > step:
                break
            if record is not None and line.endswith(b"\n"):
                end = position
    os.truncate(path, end)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < _MOST_STEPS:
        return None
    return {name: _bounded(value) for name, value in record.items() if _is_of_its_kind(name, value)}


def _is_of_its_kind(name: str, value: Any) -> bool:
    if name in _MAPPINGS:
        return isinstance(value, dict)
    if value is None or name in _TEXTS:
        return value is None or isinstance(value, str)
    return _is_number(value) and (name not in _COUNTS or value >= 0)


def _bounded(value: Any) -> Any:
    """Within a mapping: NaN for numbers beyond the largest, and for whatever else stands in a list."""
    if isinstance(value, dict):
        return {name: _bounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [item if _is_number(item) else math.nan for item in value]
    return value if _is_number(value) or not isinstance(value, (int, float)) else math.nan


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
