"""Writes a run's checkpoints: at once, or in the background while training goes on.

megatron-core plans what each rank writes, over the data parallel ranks too, and writes the index when all are done.
Between the two the files are written (`checkpoints/files.py`), by this process or by one beside it
(`background_writer.py`), for which the loop waits only until the state is copied. (megatron-core's own background
writers need CUDA.) Each file is brought to disk, read back, and compared with the CRC-32 of what was to be written;
only then does the checkpoint get its name.

Something that fails on one rank, such as a full disk, fails the save on every rank, in the same sentence, and leaves
nothing behind but what was there.
"""

import contextlib
import gc
import os
import queue
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_lrc.checkpoints.background_writer import BackgroundWriter
from megatron_lrc.checkpoints.files import Bucket, FileSum, Written, reason, write_files
from megatron_lrc.checkpoints.run_directory import (
    RunState,
    checkpoint_path,
    partial_path,
    publish,
    remove_leftovers,
    remove_old,
)
from megatron_lrc.config import Config, ModelShape
from megatron_lrc.mcore import compat
from megatron_lrc.mcore.checkpoint import sharded_bytes, sharded_state
from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.mcore.optimizer import StageOptimizer
from megatron_lrc.mcore.stages import PipelineStage

#: Kept free on the disk for the index and run.json, which are written last, by one rank.
RESERVE_FILE, _RESERVE_BYTES = "reserve", 1 << 20

T = TypeVar("T")


class SaveFailed(Exception):
    """A checkpoint could not be written; alike on every rank. The message is a sentence for the user."""


@dataclass(slots=True)
class _Pending:
    """A save under way: what was planned, and what this rank has written; None while the process beside it writes."""

    final: Path
    partial: Path
    state: RunState
    student: ModelShape
    finalize: list[Callable[[], None]]  # megatron-core's, which look into the next for what this rank has written
    index_results: queue.Queue
    written: Written | None


class CheckpointWriter:
    """Saves one run, one checkpoint at a time. `start` and `finish` are collective."""

    def __init__(self, config: Config, groups: Groups):
        self._config, self._groups = config, groups
        self._strategy = compat.save_strategy(groups.dp_cp)
        self._is_checked = False
        self._pending: _Pending | None = None
        self._background = BackgroundWriter() if config.checkpoint.async_save else None
        assert config.checkpoint.save
        if groups.is_main_rank:
            remove_leftovers(config.checkpoint.save)

    def expect_other_tensors(self) -> None:
        """What is saved from now on is no longer what was saved before: it has to be planned anew."""
        assert self._pending is None
        self._strategy = compat.save_strategy(self._groups.dp_cp)
        self._is_checked = False

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files are still being written. Does not wait."""
        return self._background is not None and self._background.is_writing

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
        buckets = [_with_indices(bucket) for bucket in request.preload_fn()] if request.preload_fn else []
        shape = stages[0].shapes.student
        pending = _Pending(final, partial, replace(state), shape, request.finalize_fns, index_results, written=None)
        if self._background is None or not self._background.start(buckets):
            pending.written = write_files(buckets)
        self._pending = pending

    def finish(self) -> Path | None:
        """Wait until every rank has written its files, and give the checkpoint its name; None if nothing is
        pending. SaveFailed if it could not be written. What was there before is untouched then."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        if pending.written is None:
            assert self._background is not None
            pending.written = self._background.finish()
        outcome, sums = pending.written
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (outcome if isinstance(outcome, str) else None, sums))
        try:
            if failure := next((error for error, _ in everyone if error), None):
                raise SaveFailed(failure)
            self._write_index(pending, outcome)
            self._publish(pending, {name: found for _, part in everyone for name, found in part.items()})
        except (SaveFailed, CheckpointException) as error:
            if self._groups.is_main_rank:
                shutil.rmtree(pending.partial, ignore_errors=True)
            raise SaveFailed(f"step {pending.state.step} could not be saved: {error}") from None
        return pending.final

    def close(self) -> None:
        """End the process that writes in the background, if there is one. Not collective."""
        if self._background is not None:
            self._background.close()

    def _write_index(self, pending: _Pending, outcome: object) -> None:
        """megatron-core's part of finishing: the index, from what all ranks have written."""
        if self._groups.is_main_rank:
            (pending.partial / RESERVE_FILE).unlink(missing_ok=True)
        pending.index_results.put(outcome)
        for finalize in pending.finalize:
            finalize()

    def _publish(self, pending: _Pending, sums: dict[str, FileSum]) -> None:
        checkpoint = self._config.checkpoint

        def publish_and_remove() -> None:
            publish(pending.partial, pending.final, pending.state, self._config, pending.student, sums)
            remove_old(
                pending.final.parent,
                pending.state.step,
                keep_last=checkpoint.keep_last,
                retain_interval=checkpoint.save_retain_interval,
            )

        self._on_main_rank(publish_and_remove)

    def _on_main_rank(self, function: Callable[[], T]) -> T:
        """What `function` returns there, on every rank; SaveFailed on every rank if it raises OSError. Collective."""
        answer: list[Any] = [None, None]
        if self._groups.is_main_rank:
            try:
                answer[0] = function()
            except OSError as error:
                answer[1] = reason(error)
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise SaveFailed(answer[1])
        return answer[0]


def _with_indices(bucket: Any) -> Bucket:
    """megatron-core's description of a file, with no more of each planned item than the file's index will need."""
    path, name, (objects, tensors) = bucket
    first, second = ([(item.index, content) for item, content in items] for items in (objects, tensors))
    return path, name, (first, second)


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
    """A new folder to write a checkpoint of `needed` bytes in. OSError if the disk has no room for it.

    Absolute: it is told to ranks whose working directories may be others.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(final.parent).free) < needed + _RESERVE_BYTES:
        raise OSError(
            f"it takes {needed / 1e9:.2f} GB and {final.parent} has {free / 1e9:.2f} GB free; make room, or have "
            "older checkpoints removed with --keep-last"
        )
    partial = partial_path(final.absolute(), secrets.token_hex(4))
    partial.mkdir()
    try:
        with open(partial / RESERVE_FILE, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, _RESERVE_BYTES)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial
