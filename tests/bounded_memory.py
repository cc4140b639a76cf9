"""Calls a function in a process that may take only so much more memory: where it wants more, MemoryError."""

import multiprocessing
import os
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def call_within(num_bytes: int, function: Callable, *arguments: Any) -> Any:
    """The function's result, or what it raises. num_bytes: of address space beside what this process has."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, num_bytes, function, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = RuntimeError(f"died without a word, exit code {process.exitcode}")
    process.join()
    if isinstance(result, BaseException):
        raise result
    return result


def _run(sender: Connection, num_bytes: int, function: Callable, arguments: tuple) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        result = function(*arguments)
    except BaseException as error:
        result = type(error)(*map(str, error.args))
    sender.send(result)
    os._exit(0)
