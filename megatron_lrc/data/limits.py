"""A bound on what a program of somebody else's, such as a chat template, may take: time and memory."""

import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


class TakesTooMuch(Exception):
    """Time or memory. The message completes "it takes "."""


class _TimeIsOver(BaseException):
    """Not an Exception, which the program may catch, as Jinja's compiler does."""


def call_within(function: Callable[[], Result], *, seconds: float, num_bytes: int) -> Result:
    """The function's result. TakesTooMuch where it takes more than this processor time, or memory beside what the
    process has.

    Time is this process's own, so that a busy machine changes nothing, and is kept in its main thread only. Memory is
    that of all its threads, on Linux only. Not for what opens files or calls libraries that end where memory does.
    """
    try:
        # In this order: the time may be over at any moment within `_in_time`, a cleaning up of its callee's included.
        return _in_memory(lambda: _in_time(function, seconds), num_bytes)
    except _TimeIsOver:
        raise TakesTooMuch(f"more than {seconds:g} s") from None
    except MemoryError:
        raise TakesTooMuch(f"more than {num_bytes >> 20} MiB of memory") from None


def _in_time(function: Callable[[], Result], seconds: float) -> Result:
    if threading.current_thread() is not threading.main_thread():
        return function()
    is_running = True

    def give_up(*_: object) -> None:
        if is_running:
            raise _TimeIsOver

    before = signal.signal(signal.SIGVTALRM, give_up)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # once: one that comes when the function has ended is the last
        try:
            return function()
        finally:
            is_running = False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _in_memory(function: Callable[[], Result], num_bytes: int) -> Result:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return function()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [pages * os.sysconf("SC_PAGE_SIZE") + num_bytes, soft, hard]
    resource.setrlimit(resource.RLIMIT_AS, (min(bound for bound in bounds if bound >= 0), hard))
    try:
        return function()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
