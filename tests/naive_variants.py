"""Forms of the naive LRC that are something else, or fail. Sent by name to a process that has `tests/` on its path.

Imports what that process imports anyway, so that what it holds can be told (`Telling`).
"""

import ctypes
import os
import sys
from copy import deepcopy
from multiprocessing import Pipe
from threading import Thread

import torch

from benchmarks.naive import NaiveClone
from benchmarks.naive_process import NaiveProcess, serve
from megatron_lrc.config import ConfigError


class InAThread(NaiveProcess):
    """The same exchange without the seconds that a process takes to start."""

    def __init__(self):
        self._connection, theirs = Pipe()
        self._thread = Thread(target=serve, args=(theirs,))
        self._thread.start()

    def close(self):
        self._connection.close()
        self._thread.join()


class OtherAlpha(NaiveClone):
    def __init__(self, config, *rest, **more):
        other = deepcopy(config)
        other.loss.alpha *= 1.1
        super().__init__(other, *rest, **more)


class NoValueTerm(NaiveClone):
    def _clone_loss(self, layer, site):
        return super()._clone_loss(layer, site) * (0.0 if (layer, site) == (1, "v") else 1.0)


class Failing(NaiveClone):
    def step(self, batches, num_microbatches):
        return [][num_microbatches]


class Ending(NaiveClone):
    def __init__(self, *rest, **more):
        sys.stderr.write("something before\nthe last words\n")
        sys.stderr.flush()
        os._exit(3)


class WithoutMemory(NaiveClone):
    def step(self, batches, num_microbatches):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Telling(NaiveClone):
    """Fails with what there is to tell: threads, megatron-core, what a large block takes from the system."""

    def step(self, batches, num_microbatches):
        has_megatron = any(name.startswith("megatron.core") for name in sys.modules)
        told = f"threads {torch.get_num_threads()}, megatron-core {has_megatron}, mapped {mapped_for_a_large_block()}"
        raise ConfigError(told)


def mapped_for_a_large_block() -> bool:
    """Whether malloc, as it is by default, maps a block of 100 MB by itself."""
    before = _mapped_blocks()
    block = torch.empty(100_000_000, dtype=torch.uint8)
    mapped = _mapped_blocks() - before
    del block
    return mapped == 1


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        ("arena_to_smblks", ctypes.c_size_t * 3),
        ("hblks", ctypes.c_size_t),
        ("hblkhd_to_keepcost", ctypes.c_size_t * 6),
    ]


def _mapped_blocks() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2  # glibc 2.33
    mallinfo2.restype = _Mallinfo
    return mallinfo2().hblks
