"""A bound on what a program of somebody else's, such as a chat template, may take: time and memory."""

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class TakesTooMuch(Exception):
    """Time or memory. The message completes "it takes "."""


class _TimeIsOver(BaseException):
    """Not an Exception, which the program may catch, as Jinja's compiler does."""


@contextlib.contextmanager
def limited(*, seconds: float, num_bytes: int) -> Iterator[None]:
    """TakesTooMuch where the block takes more than this processor time, or memory beside what the process has.

    Time is this process's own, so that a busy machine changes nothing, and is kept in its main thread only. Memory is
    that of all its threads, on Linux only. Not for what opens files or calls libraries that end where memory does.
    """
    try:
        with _limited_time(seconds), _limited_memory(num_bytes):
            yield
    except _TimeIsOver:
        raise TakesTooMuch(f"more than {seconds:g} s") from None
    except MemoryError:
        raise TakesTooMuch(f"more than {num_bytes >> 20} MiB of memory") from None


@contextlib.contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_: Any) -> None:
        raise _TimeIsOver

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _limited_memory(num_bytes: int) -> Iterator[None]:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [pages * os.sysconf("SC_PAGE_SIZE") + num_bytes, soft, hard]
    resource.setrlimit(resource.RLIMIT_AS, (min(bound for bound in bounds if bound >= 0), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
