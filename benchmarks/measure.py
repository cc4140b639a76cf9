"""Measuring a program from outside: wall time, processor time, and the memory of all its processes; and a function."""

import contextlib
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, TypeVar

import psutil
import torch

from megatron_lrc.config import ConfigError

SECONDS_BETWEEN_SAMPLES = 0.2  # of memory; the kernel works some milliseconds for each

T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """seconds: from start to end, start-up included. cpu_seconds: of all processes. Peaks in bytes: `tree_memory`.

    The peak of a single process is the kernel's own on Linux: nothing between two samples is missed.
    """

    seconds: float
    cpu_seconds: float
    peak_rss: int
    peak_pss: int


@dataclass(frozen=True)
class Spread:
    """The median of several figures, and how far they went."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))

    def text(self, decimals: int) -> str:
        middle, low, high = (f"{value:,.{decimals}f}" for value in (self.median, self.lowest, self.highest))
        return f"{middle} ({low}-{high})"


def tree_memory(process: psutil.Process) -> tuple[int, int]:
    """RSS and PSS in bytes, summed over a process and all below it.

    RSS counts a page that several processes share once for each of them, as forked workers do with what their parent
    had loaded; PSS divides it between them. PSS is Linux's own: 0 elsewhere.
    """
    rss = pss = 0
    with contextlib.suppress(psutil.Error):  # whoever ended meanwhile has no memory any more
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                memory = member.memory_full_info()
                rss, pss = rss + memory.rss, pss + getattr(memory, "pss", 0)
    return rss, pss


def high_water_mark(pid: int) -> int:
    """The largest RSS in bytes that a process has had. Linux's own: 0 elsewhere, and when it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _cpu_seconds() -> float:
    """Of all child processes that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(command: list[str], environment: dict[str, str]) -> Measured:
    """Runs a program to its end. ConfigError with the last line of its stderr if it fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        start, cpu_before = time.perf_counter(), _cpu_seconds()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            watched, peaks = psutil.Process(process.pid), (0, 0)
            while process.poll() is None:
                rss, pss = tree_memory(watched)
                peaks = max(peaks[0], rss, high_water_mark(process.pid)), max(peaks[1], pss)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(SECONDS_BETWEEN_SAMPLES)
            seconds = time.perf_counter() - start
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode:
            raise ConfigError(
                f"{' '.join(command[1:3])} ended with exit code {process.returncode}: {last_line(errors)}"
            )
    return Measured(seconds, _cpu_seconds() - cpu_before, *peaks)


def last_line(file: IO[str]) -> str:
    """Of what a program wrote: the last line that is not empty."""
    file.seek(0)
    return next((line.strip() for line in reversed(file.readlines()) if line.strip()), "no message")


def synchronize(device: torch.device) -> None:
    """Wait for the work that the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds until the device has done what `function` gives it, and what the function returns."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - start, result


def total_bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def table(rows: list[list[str]]) -> list[str]:
    """Lines of aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
