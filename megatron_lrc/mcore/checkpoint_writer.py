"""Writes a run's checkpoints: at once, or in the background while training goes on.

megatron-core plans what each rank writes, over the data parallel ranks too, and writes the index when all are done.
Between the two this module writes the files, in this process or in a fork of it. A fork sees the tensors as they were,
copy on write, so the loop loses the time of a fork and no memory but what it changes while the fork still runs. GPU
tensors are copied to the host first. (megatron-core's own background writers need CUDA.) Each file is brought to disk,
read back, and compared with the CRC-32 of what was to be written; only then does the checkpoint get its name.

Something that fails on one rank, such as a full disk, fails the save on every rank, in the same sentence, and leaves
nothing behind but what was there.
"""

import contextlib
import ctypes
import gc
import io
import multiprocessing
import os
import pickle
import queue
import secrets
import shutil
import signal
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from megatron_lrc.config import Config, ModelShape
from megatron_lrc.mcore import compat
from megatron_lrc.mcore.checkpoint import sharded_bytes, sharded_state
from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.mcore.optimizer import StageOptimizer
from megatron_lrc.mcore.run_directory import (
    FileSum,
    RunState,
    checkpoint_path,
    partial_path,
    publish,
    remove_leftovers,
    remove_old,
)
from megatron_lrc.mcore.stages import PipelineStage

#: Kept free on the disk for the index and run.json, which are written last, by one rank.
RESERVE_FILE, _RESERVE_BYTES = "reserve", 1 << 20
_PR_SET_PDEATHSIG = 1

T = TypeVar("T")


class SaveFailed(Exception):
    """A checkpoint could not be written; alike on every rank. The message is a sentence for the user."""


@dataclass(slots=True)
class _Pending:
    """A save under way: what was planned, where this rank's results will be, and the fork that writes, if there is."""

    final: Path
    partial: Path
    state: RunState
    student: ModelShape
    finalize: list[Callable[[], None]]  # megatron-core's, which look into the next for what this rank has written
    index_results: queue.Queue
    results: IO[bytes]  # without a name: a fork writes to it, this process reads it
    process: Any = None  # multiprocessing's, of whichever start method


class CheckpointWriter:
    """Saves one run, one checkpoint at a time. `start` and `finish` are collective."""

    def __init__(self, config: Config, groups: Groups):
        self._config, self._groups = config, groups
        self._strategy = compat.save_strategy(groups.dp_cp)
        self._is_checked = False
        self._pending: _Pending | None = None
        assert config.checkpoint.save
        if groups.is_main_rank:
            remove_leftovers(config.checkpoint.save)

    @property
    def is_pending(self) -> bool:
        """Whether a save was started and not finished."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files are still being written. Does not wait."""
        return self._pending is not None and self._pending.process is not None and self._pending.process.is_alive()

    def start(self, state: RunState, stages: Sequence[PipelineStage], optimizer: StageOptimizer) -> None:
        """Write the state as it is now; with --async-save only begin to. SaveFailed if it cannot be begun."""
        assert self._pending is None and self._config.checkpoint.save
        values = sharded_state(stages, optimizer, is_loading=False)
        final = checkpoint_path(self._config.checkpoint.save, state.step)
        needed = sharded_bytes(values)
        partial = self._on_main_rank(lambda: _make_room(final, needed))
        with _without_collecting():
            request, index_results = compat.request_save(values, partial, self._strategy, is_checked=self._is_checked)
        self._is_checked = True
        buckets = request.preload_fn() if request.preload_fn else []
        results = _memory_file()
        shape = stages[0].shapes.student
        pending = _Pending(final, partial, replace(state), shape, request.finalize_fns, index_results, results)
        if self._config.checkpoint.async_save:
            pending.process = _fork(_write, buckets, results)
        if pending.process is None:
            _write(buckets, results)
        self._pending = pending

    def finish(self) -> Path | None:
        """Wait until every rank has written its files, and give the checkpoint its name; None if nothing is pending.

        SaveFailed if it could not be written. What was there before is untouched then.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        if pending.process is not None:
            pending.process.join()
        outcome, sums = _read_results(pending.results)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (outcome if isinstance(outcome, str) else None, sums))
        failure = next((error for error, _ in everyone if error), None)
        if failure is None:
            failure = self._write_index(pending, outcome)
        if failure is None:
            all_sums = {name: found for _, part in everyone for name, found in part.items()}
            failure = self._publish(pending, all_sums)
        if failure is not None:
            if self._groups.is_main_rank:
                shutil.rmtree(pending.partial, ignore_errors=True)
            raise SaveFailed(f"step {pending.state.step} could not be saved: {failure}")
        return pending.final

    def _write_index(self, pending: _Pending, outcome: object) -> str | None:
        """megatron-core's part of finishing: the index, from what all ranks have written."""
        if self._groups.is_main_rank:
            (pending.partial / RESERVE_FILE).unlink(missing_ok=True)
        pending.index_results.put(outcome)
        try:
            for finalize in pending.finalize:
                finalize()
        except CheckpointException as error:
            return str(error)
        return None

    def _publish(self, pending: _Pending, sums: dict[str, FileSum]) -> str | None:
        checkpoint = self._config.checkpoint

        def publish_and_remove() -> None:
            publish(pending.partial, pending.final, pending.state, self._config, pending.student, sums)
            remove_old(
                pending.final.parent,
                pending.state.step,
                keep_last=checkpoint.keep_last,
                retain_interval=checkpoint.save_retain_interval,
            )

        try:
            self._on_main_rank(publish_and_remove)
        except SaveFailed as error:
            return str(error)
        return None

    def _on_main_rank(self, function: Callable[[], T]) -> T:
        """What `function` returns there, on every rank; SaveFailed on every rank if it raises OSError. Collective."""
        answer: list[Any] = [None, None]
        if self._groups.is_main_rank:
            try:
                answer[0] = function()
            except OSError as error:
                answer[1] = _reason(error)
        dist.broadcast_object_list(answer, src=0)
        value, failure = answer
        if failure is not None:
            raise SaveFailed(failure)
        return value


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """The plan makes many objects, and a collection of garbage would take longer than all of it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _make_room(final: Path, needed: int) -> Path:
    """A new folder to write a checkpoint of `needed` bytes in. OSError if the disk has no room for it."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(final.parent).free) < needed + _RESERVE_BYTES:
        raise OSError(
            f"it takes {needed / 1e9:.2f} GB and {final.parent} has {free / 1e9:.2f} GB free; make room, or have "
            "older checkpoints removed with --keep-last"
        )
    partial = partial_path(final, secrets.token_hex(4))
    partial.mkdir()
    try:
        with open(partial / RESERVE_FILE, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, _RESERVE_BYTES)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial


# ------------------------------------------------------------------------------------------------ one rank's files


def _memory_file() -> IO[bytes]:
    """A file that a fork shares, and no full disk can fail."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("results"), "w+b")
    return tempfile.TemporaryFile()  # noqa: SIM115 (closed when it has been read)


def _fork(function: Callable, *args: object) -> Any:
    """A forked process that runs the function and dies with this one; None where there is no memory for one."""
    process = multiprocessing.get_context("fork").Process(target=_in_child, args=(function, args), daemon=True)
    with warnings.catch_warnings():
        # It only copies memory to files: no lock that another thread of this process may hold is taken.
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        try:
            process.start()
        except OSError:
            return None
    return process


def _in_child(function: Callable, args: tuple) -> None:
    gc.disable()  # collecting what the parent owns would copy its pages, and touch CUDA
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    function(*args)


def _write(buckets: list[tuple], results: IO[bytes]) -> None:
    """Write this rank's files; leave what megatron-core wants to know, or what failed, and the sums in `results`."""
    written, sums = {}, {}
    try:
        for place, (path, name, (objects, tensors)) in enumerate(buckets):
            written[place], sums[name] = _write_file(Path(path), name, [*objects, *tensors])
        outcome = (written, sums)
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch makes of a failed write
        outcome = (_reason(error), {})
    pickle.dump(outcome, results)
    results.flush()


def _read_results(results: IO[bytes]) -> tuple[dict | str, dict[str, FileSum]]:
    with results:
        results.seek(0)
        try:
            return pickle.load(results)
        except EOFError:
            return "the process that wrote it died, perhaps for want of memory", {}


class _Summing:
    """What torch.save needs of a file, adding up the CRC-32 of what goes by."""

    def __init__(self, file: IO[bytes]):
        self._file, self.size, self.crc32 = file, 0, 0

    def write(self, content: Any) -> int:
        self.crc32 = zlib.crc32(content, self.crc32)
        self.size += memoryview(content).nbytes
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()


def _write_file(path: Path, name: str, items: list[tuple]) -> tuple[list[WriteResult], FileSum]:
    """Write objects and tensors one after the other, bring them to disk, and read them back."""
    results = []
    with open(path, "wb", buffering=0) as raw, io.BufferedWriter(raw) as file:
        stream = _Summing(file)
        for item, content in items:
            start = stream.size
            if isinstance(content, io.BytesIO):
                stream.write(content.getbuffer())
            else:
                torch.save(content, stream)
            place = _StorageInfo(name, start, stream.size - start)
            results.append(WriteResult(index=item.index, size_in_bytes=place.length, storage_data=place))
        file.flush()
        os.fsync(raw.fileno())
        with contextlib.suppress(OSError):  # so that the disk is read, not the cache; where the file system can
            os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    written = FileSum(stream.size, stream.crc32)
    if FileSum.of(path) != written:
        raise OSError(f"{path} does not read back as it was written: the disk is failing")
    return results, written


def _reason(error: Exception) -> str:
    """A failed write, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return error.strerror + where
    return str(error).partition("\n")[0]
