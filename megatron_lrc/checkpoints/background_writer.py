"""A process beside each rank that writes its checkpoints' files while training goes on.

The rank copies its tensors into memory that both share, which is all that it waits for; the process writes
them (`checkpoints/files.py`) and answers with what it has written. It is started once, has loaded torch and
nothing else, and ends with the rank. Its memory is as large as this rank's part of a checkpoint.

Rejected: a fork for each save. As long as it lives, every page that the next step writes to is copied first.
"""

import contextlib
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch
from torch import Tensor

from megatron_lrc.checkpoints.files import Bucket, Written, write_files
from megatron_lrc.launch.torchrun import end_with_parent

#: What the process runs, with the descriptors of its end of the connection and of the shared memory, and its parent.
ENTRY = "megatron_lrc.checkpoints.background_writer:serve"

_ALIGNMENT = 64  # bytes; more than any dtype needs


@dataclass(frozen=True, slots=True)
class _Staged:
    """A tensor in the shared memory, contiguous. offset in bytes."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size

    def tensor(self, memory: mmap.mmap) -> Tensor:
        """With a storage of its own size: torch.save writes whole storages."""
        count = self.shape.numel()
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.offset).view(self.shape)


class BackgroundWriter:
    """One rank's writer process. To be made and used in the main thread, with which the process dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._connection: Connection
        self._file: int
        self._memory: mmap.mmap | None = None
        self._is_ready = self._is_busy = False
        with contextlib.suppress(OSError):
            self._start_process()  # now, so that it is ready at the first save

    def start(self, buckets: list[Bucket]) -> bool:
        """Copy what is to be written and begin to write it; False if there is no process yet, or no memory for that."""
        assert not self._is_busy
        try:
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._start_process()
            if not self._is_ready and not self._connection.poll():
                return False  # still loading torch: a save must not wait for that
            if not self._is_ready:
                self._connection.recv()
                self._is_ready = True
            self._connection.send(self._stage(buckets))
        except (EOFError, OSError):
            return False
        self._is_busy = True
        return True

    @property
    def is_writing(self) -> bool:
        """Whether what was started is still being written. Does not wait."""
        return self._is_busy and not self._connection.poll()

    def finish(self) -> Written:
        """Wait for what was started."""
        self._is_busy = False
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            return "the process that wrote it died, perhaps for want of memory", {}

    def close(self) -> None:
        """End the process, which finishes first what it is writing."""
        if self._process is None:
            return
        if self._is_busy:
            with contextlib.suppress(OSError):  # it may have died
                self._connection.send(None)  # its end stays open while a forked data loader holds a copy of ours
        else:
            self._process.kill()  # it has nothing to lose, and may take seconds yet to load torch
        self._connection.close()
        self._process.wait()
        os.close(self._file)
        self._process = self._memory = None
        self._is_ready = False

    def _start_process(self) -> None:
        if not hasattr(os, "memfd_create"):  # Linux only
            raise OSError("no memory that two processes can share")
        self._file = os.memfd_create("checkpoint")
        self._connection, its_end = Pipe()
        with its_end:
            module, _, function = ENTRY.partition(":")
            arguments = f"{its_end.fileno()}, {self._file}, {os.getpid()}"
            code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import {function}; {function}({arguments})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=(its_end.fileno(), self._file),
                start_new_session=True,  # signals to the rank's process group are not for it
                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )

    def _stage(self, buckets: list[Bucket]) -> tuple[int, list[Bucket]]:
        """The memory's size, and the buckets with each tensor's place in it instead of the tensor."""
        size, places = 0, []
        for tensor in _tensors(buckets):
            places.append(_Staged(size, tensor.dtype, tensor.shape))
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        memory = self._memory_of(size)
        for place, tensor in zip(places, _tensors(buckets), strict=True):
            place.tensor(memory).copy_(tensor)
        left = iter(places)
        return len(memory), [
            (path, name, (objects, [(index, next(left)) for index, _ in tensors]))
            for path, name, (objects, tensors) in buckets
        ]

    def _memory_of(self, size: int) -> mmap.mmap:
        if self._memory is None or len(self._memory) < size:
            size = max(size, mmap.PAGESIZE)
            os.posix_fallocate(self._file, 0, size)  # OSError where a page that is missing would be a signal
            self._memory = mmap.mmap(self._file, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        return self._memory


def _tensors(buckets: list[Bucket]) -> Iterator[Tensor]:
    return (tensor for _, _, (_, tensors) in buckets for _, tensor in tensors)


# ------------------------------------------------------------------------------------------------ in the process


def serve(connection_file: int, memory_file: int, parent: int) -> None:
    """Write what comes until the rank says that it was the last, or is no more."""
    end_with_parent(signal.SIGKILL)  # Linux only; elsewhere the end of the connection says it
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)  # where training needs every core, it goes first
    torch.set_num_threads(1)
    memory: mmap.mmap | None = None
    with Connection(connection_file) as connection, contextlib.suppress(EOFError, BrokenPipeError):
        connection.send("ready")
        while True:
            if (message := connection.recv()) is None:
                return
            size, buckets = message
            if memory is None or len(memory) != size:
                memory = mmap.mmap(memory_file, size)
            connection.send(write_files([_with_tensors(bucket, memory) for bucket in buckets]))


def _with_tensors(bucket: Any, memory: mmap.mmap) -> Bucket:
    path, name, (objects, staged) = bucket
    return path, name, (objects, [(index, place.tensor(memory)) for index, place in staged])
