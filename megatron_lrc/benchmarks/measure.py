"""Measuring a program from outside: wall time, processor time, and the memory of all its processes."""

import contextlib
import resource
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import psutil

from megatron_lrc.config import ConfigError

SECONDS_BETWEEN_SAMPLES = 0.2  # of memory; the kernel works some milliseconds for each


@dataclass(frozen=True)
class Measured:
    """seconds: from start to end, start-up included. cpu_seconds: of all processes. Peaks in bytes: `tree_memory`."""

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
                peaks = max(peaks[0], rss), max(peaks[1], pss)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(SECONDS_BETWEEN_SAMPLES)
            seconds = time.perf_counter() - start
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode:
            errors.seek(0)
            last = next((line.strip() for line in reversed(errors.readlines()) if line.strip()), "no message")
            raise ConfigError(f"{' '.join(command[1:3])} ended with exit code {process.returncode}: {last}")
    return Measured(seconds, _cpu_seconds() - cpu_before, *peaks)


def table(rows: list[list[str]]) -> list[str]:
    """Lines of aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
