"""Runs a function on several gloo ranks, each a process; the first failing rank's traceback is the test's failure.

The processes meet through a file, so no port can be taken by another test; a world that hangs is killed in time.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

#: Imported once by the server that every rank is forked from: these cost seconds, and start no threads.
PRELOAD = ["megatron_lrc.train.loop", "torch.utils.tensorboard", "transformers.models.llama.modeling_llama"]

#: Seconds in which the other ranks may say what they know of a failure.
_LAST_WORDS = 3.0


def run_ranks(num_ranks: int, function: Callable, *args: Any, timeout: float = 120.0) -> list[Any]:
    """`function(*args)` on each rank of a new world; the results by rank. `function` must be importable (no lambda)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(num_ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_run, args=(rank, num_ranks, str(Path(folder) / "store"), sender, function, args)
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                process.join()


def _collect(pipes: list[Connection], processes: list[BaseProcess], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[arg-type]
            try:
                error, results[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join(1)
                error = f"died without a word, exit code {processes[rank].exitcode}"
            if error:
                failures[rank] = error
                deadline = min(deadline, time.monotonic() + _LAST_WORDS)
    if failures:
        # The others of a world notice that one is gone, perhaps sooner than we hear why it went.
        first = min(failures, key=lambda rank: "by peer" in failures[rank])
        others = "".join(f"\nrank {rank}: {text.splitlines()[-1]}" for rank, text in failures.items() if rank != first)
        raise AssertionError(f"rank {first} failed:\n{failures[first]}{others}")
    if waiting:
        raise TimeoutError(f"ranks {sorted(waiting.values())} did not finish")
    return [results[rank] for rank in range(len(pipes))]


def _run(rank: int, size: int, store: str, sender: Connection, function: Callable, args: tuple) -> None:
    os.setsid()
    faulthandler.enable()  # where a rank was that dies in a library's C code
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # as of a launcher; they have met below by then
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        result = function(*args)
        sender.send_bytes(pickle.dumps((None, result)))  # not send(): it would share memory with a dying process
        with contextlib.suppress(RuntimeError):  # ranks whose result has arrived may be gone already
            dist.barrier()
    except BaseException:
        sender.send_bytes(pickle.dumps((traceback.format_exc(), None)))
        raise
