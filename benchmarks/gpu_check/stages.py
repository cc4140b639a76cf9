"""Runs stages of checks one after the other, each within its own time, and writes down what each check found.

A check that fails, or whose stage runs over its time, is written down and the next one goes on. The file is written
anew, whole, before and after every check, so that it says what was under way if the process dies.
"""

import contextlib
import faulthandler
import json
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.checks import Bound, Check, Checks, Skip
from benchmarks.gpu_check.left_behind import free_memory
from benchmarks.gpu_check.settings import Settings
from megatron_lrc.whole_files import write_whole

OK, FAILED, OVER_TIME, SKIPPED, RUNNING = "ok", "failed", "over time", "skipped", "running"
#: Seconds that a stage which is over its time may hang in C code, where no signal reaches it, before all ends.
GRACE = 60.0
#: Warnings that are written down with a check.
MOST_WARNINGS = 10


class OutOfTime(BaseException):
    """A stage has had its time. Not an Exception, so that nobody on the way takes it for an error of his own."""


@dataclass(frozen=True)
class Stage:
    """checks: yields them in their order; what it sets up it clears away when it is closed, which may be early."""

    name: str
    seconds: float
    checks: Callable[[Settings], Checks]


class Record:
    """What has been found, as a file in JSON: {..., "stages": [{"name", "status", "seconds", "limit_seconds", "checks":
    [{"name", "status", "seconds", "figures", "warnings", "error"}]}]}."""

    def __init__(self, path: Path, about: Mapping[str, Any], say: Callable[[str], None]):
        """about: what stands at the top of the file. say: told of each check as it ends."""
        self._path, self._say = path, say
        self.content: dict[str, Any] = {**about, "stages": []}

    @property
    def stages(self) -> list[dict[str, Any]]:
        return self.content["stages"]

    @property
    def is_good(self) -> bool:
        return all(stage["status"] in (OK, SKIPPED) for stage in self.stages)

    def write(self) -> None:
        write_whole(self._path, json.dumps(self.content, indent=1) + "\n")

    def note(self, entry: dict[str, Any], line: str) -> None:
        self.write()
        self._say(f"{entry['seconds']:6.1f} s  {entry['status']:9}  {line}")


def run_stages(stages: Sequence[Stage], settings: Settings, record: Record) -> None:
    """Each has its own time, or what is left of `settings.seconds`. It begins unless that is less than a quarter."""
    end = time.monotonic() + settings.seconds
    for stage in stages:
        _run_stage(stage, settings, record, min(stage.seconds, end - time.monotonic()))


def _run_stage(stage: Stage, settings: Settings, record: Record, seconds: float) -> None:
    entry: dict[str, Any] = {"name": stage.name, "status": RUNNING, "limit_seconds": seconds, "checks": []}
    record.stages.append(entry)
    if seconds < stage.seconds / 4:
        entry |= {"status": SKIPPED, "reason": "no time is left for it", "seconds": 0.0}
    else:
        checks = stage.checks(replace(settings, seconds=seconds))
        with _status_of(entry), time_limit(seconds), contextlib.closing(checks):
            for check in checks:
                _run_check(check, entry, record)
        entry["status"] = _worst([entry["status"], *(check["status"] for check in entry["checks"])])
    forget()
    record.note(entry, stage.name)


@contextlib.contextmanager
def _status_of(entry: dict[str, Any]) -> Iterator[None]:
    """Write down how something ends: in nothing, an error, or lack of time."""
    start = time.monotonic()
    try:
        yield
        entry["status"] = OK
    except Skip as reason:
        entry |= {"status": SKIPPED, "reason": str(reason)}
    except OutOfTime:
        entry |= {"status": OVER_TIME, "error": "the stage's time was over"}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        entry |= {"status": FAILED, "error": text[:1000], "traceback": traceback.format_exc()[-4000:]}
    entry["seconds"] = time.monotonic() - start


def _run_check(check: Check, stage: dict[str, Any], record: Record) -> None:
    entry: dict[str, Any] = {"name": check.name, "status": RUNNING}
    stage["checks"].append(entry)
    record.write()
    with _status_of(entry), _warnings_into(entry):
        figures = check.run()
        entry["figures"] = {name: _plain(value) for name, value in figures.items()}
        broken = [name for name, value in figures.items() if isinstance(value, Bound) and not value.is_kept]
        if broken:
            raise AssertionError(f"above what is allowed: {', '.join(broken)}")
    record.note(entry, f"{stage['name']}: {check.name}{_why(entry)}")
    if entry["status"] == OVER_TIME:
        raise OutOfTime


def _why(entry: dict[str, Any]) -> str:
    why = entry.get("reason") or entry.get("error")
    return f": {why.splitlines()[0]}" if why else ""


@contextlib.contextmanager
def _warnings_into(entry: dict[str, Any]) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        try:
            yield
        finally:
            texts = dict.fromkeys(str(warning.message).splitlines()[0][:300] for warning in caught)
            if texts:
                entry["warnings"] = list(texts)[:MOST_WARNINGS]


def _plain(value: Any) -> Any:
    return value._asdict() if isinstance(value, Bound) else value


def _worst(statuses: Sequence[str]) -> str:
    """Of a stage: skipped only if all its checks are."""
    if bad := next((status for status in (FAILED, OVER_TIME) if status in statuses), None):
        return bad
    return SKIPPED if set(statuses[1:]) == {SKIPPED} or statuses[0] == SKIPPED else OK


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """OutOfTime in the main thread when these are over. A process that then hangs in C code for GRACE seconds more says
    where all its threads are, and ends with exit code 1."""

    def is_over(*_: object) -> None:
        raise OutOfTime

    handler_before = signal.signal(signal.SIGALRM, is_over)
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True)
    timer_before = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler_before)
        signal.setitimer(signal.ITIMER_REAL, *timer_before)
        faulthandler.cancel_dump_traceback_later()


def forget() -> None:
    """What a stage has left behind: its models, and what was compiled for their sizes, of which torch keeps a few."""
    free_memory()
    if torch.cuda.is_available():
        torch.compiler.reset()
