"""Files that a run writes for its readers, where the disk may be full or the run directory read-only for a while.

That costs lines at most, never the run: what cannot be written waits in memory, in order, and is written with the next
line that can be.
"""

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_lrc.console import say

#: Of each file; some 50 MB of metrics.jsonl. What comes after them is lost.
MOST_WAITING = 10_000


class LogFiles:
    """What is to be done with each file: a deed raises OSError where it fails, and has then changed nothing."""

    def __init__(self) -> None:
        self._waiting: dict[Path, deque[Callable[[], object]]] = {}
        self._num_lost = 0
        self._is_failing = False

    def do(self, path: Path, deed: Callable[[], object]) -> None:
        """Now, or when it and all that waits before it can be done."""
        waiting = self._waiting.setdefault(path, deque())
        if len(waiting) < MOST_WAITING:
            waiting.append(deed)
        else:
            self._num_lost += 1
        self._catch_up()

    def append(self, path: Path, content: bytes) -> None:
        """To the end of the file, which is made with its folder where it is missing."""
        self.do(path, lambda: append(path, content))

    def close(self) -> None:
        """Whatever still waits is lost."""
        self._catch_up()
        if left := self._num_lost + sum(map(len, self._waiting.values())):
            say(f"warning: the run ends, and {left} lines of its records could not be written")

    def _catch_up(self) -> None:
        failures = {path: failure for path in self._waiting if (failure := self._work_off(path))}
        if failures and not self._is_failing:
            path, failure = next(iter(failures.items()))
            say(
                f"warning: {path} cannot be written ({failure.strerror or failure}): the run goes on; up to "
                f"{MOST_WAITING:,} lines of each of its records wait in memory, and are written when that is mended"
            )
        elif self._is_failing and not failures:
            lost = f"{self._num_lost:,} lines are lost" if self._num_lost else "nothing is lost"
            say(f"the run's records can be written again, and what waited is; {lost}")
            self._num_lost = 0
        self._is_failing = bool(failures)

    def _work_off(self, path: Path) -> OSError | None:
        waiting = self._waiting[path]
        try:
            while waiting:
                waiting[0]()
                waiting.popleft()
        except OSError as error:
            return error
        return None


def append(path: Path, content: bytes) -> None:
    """All of it or nothing, for a disk may be full in the middle. OSError then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        size = file.tell()
    try:
        with open(path, "ab") as file:
            file.write(content)
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise
