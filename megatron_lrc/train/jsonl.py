"""A run's .jsonl files: a record per line, in the order of steps. Imports no torch, so that tools answer at once."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records with a step, line by line; none where there is no file. Lines that a crash has cut are left out."""
    if not path.exists():
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
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
