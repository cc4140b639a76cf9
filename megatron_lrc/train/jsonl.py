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
    """Keep the records up to `step`. Replaces the file whole, so that a crash loses nothing."""
    if not path.exists():
        return
    partial = path.with_name(path.name + ".partial")
    with open(path, encoding="utf-8", errors="replace") as file, open(partial, "w", encoding="utf-8") as kept:
        for line in file:
            if (record := _parsed(line)) is not None and record["step"] <= step:
                kept.write(line)
    os.replace(partial, path)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
