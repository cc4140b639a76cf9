"""What lets a stopped data preparation go on: OUTPUT_PREFIX.unfinished.json, replaced every few seconds.

It says how far the sources were read and how much of each partial file belongs to that. It is written after those
bytes are on the disk, so a process or machine that dies at any moment loses seconds of work, and the whole comes out
byte for byte as if nothing had happened: documents are encoded one by one, however they are cut into chunks.
"""

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_lrc.json_files import read_object

SECONDS_BETWEEN = 5.0


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place in the sources: lines and bytes (unpacked) of the current one that are done."""

    source: int = 0
    lines: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Done:
    """All that is done. counts: key -> what its `DatasetWriter` counts. text_bytes, disk_bytes: read so far.

    rows: how many became what (`selection.ROW_COUNTS`).
    """

    position: Position = field(default_factory=Position)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    bad_lines: int = 0
    first_bad_line: str = ""
    text_bytes: int = 0
    disk_bytes: int = 0
    is_complete: bool = False  # only the final names are wanting


def _sum(values: dict[str, Any]) -> int:
    """Journals of earlier versions have none."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _is_sound(done: Done) -> bool:
    """Whether all of it is of the kinds that were written; numbers that are none would fail later."""
    numbers = [*asdict(done.position).values(), *done.rows.values(), done.bad_lines, done.text_bytes, done.disk_bytes]
    numbers += [count for counts in done.counts.values() for count in counts.values()]
    is_text = isinstance(done.first_bad_line, str) and isinstance(done.is_complete, bool)
    return is_text and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


class Journal:
    """identity: whatever decides the output's bytes; a journal of another identity is not gone on from."""

    def __init__(self, path: str, identity: dict[str, Any]):
        self.path = path
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._last = time.monotonic()

    def read(self) -> Done | None:
        """What an earlier process did for the same output; None if there is nothing, or nothing of use."""
        try:
            values = read_object(Path(self.path))
            identity, crc32 = values.pop("identity"), values.pop("crc32", None)
            if identity != self._identity or crc32 not in (None, _sum(values)):
                return None
            done = Done(**{**values, "position": Position(**values["position"])})
            return done if _is_sound(done) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def is_due(self) -> bool:
        return time.monotonic() - self._last >= SECONDS_BETWEEN

    def write(self, done: Done, sync: Callable[[], None]) -> None:
        """sync: puts what `done` speaks of on the disk; called first."""
        sync()
        partial = f"{self.path}.partial"
        with open(partial, "w", encoding="utf-8") as file:
            values = asdict(done)
            json.dump({"identity": self._identity, "crc32": _sum(values), **values}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)
        self._last = time.monotonic()

    def exists(self) -> bool:
        return os.path.exists(self.path)

    def remove(self) -> None:
        for path in (self.path, f"{self.path}.partial"):
            Path(path).unlink(missing_ok=True)
