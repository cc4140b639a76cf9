"""Which rank is slow (--log-straggler): each rank's own working time, without its waiting for others.

Under collectives all ranks' steps take equally long, so that a slow one shows only in what each does by itself:

    data      wall-clock time until the next micro-batch is there
    compute   CPU:  CPU time of the training thread in the step, which does not run while it waits in a collective; nor
                    while it waits for a core, so that a crowded machine does not show
              CUDA: time on the device of the stages' forward passes, teacher's and student's, between CUDA events;
                    backward does twice as much of the same. Collectives of TP and CP lie within, so that the ranks
                    that share a layer wait for each other there and look alike.

A rank is compared with its peers, the other ranks of its pipeline stage, which have the same work; with all others
where a stage has only one rank. Events are read at log time, when the device has been waited for anyway.

megatron-core's StragglerDetector is not used: it needs CUDA, opens a port on rank 0, prints instead of returning what
it finds, and takes the minimum and maximum over all ranks, whatever their stage.
"""

import contextlib
import socket
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.mcore.stages import PipelineStage

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class OwnTime:
    """Seconds per step that a rank worked by itself."""

    rank: int
    stage: int
    host: str
    data: float
    compute: float

    @property
    def total(self) -> float:
        return self.data + self.compute


def find_slowest(times: Sequence[OwnTime]) -> dict[str, Any] | None:
    """The rank that is furthest above the median of its peers, as a record's field; None for a single rank.
    Seconds are per step; `percent_over` is how much more own time it took than that median."""
    if len(times) < 2:
        return None

    def median_of_peers(own: OwnTime) -> float:
        others = [other for other in times if other.rank != own.rank]
        peers = [other for other in others if other.stage == own.stage] or others
        return statistics.median(other.total for other in peers)

    medians = {own.rank: median_of_peers(own) for own in times}
    slowest = max(times, key=lambda own: own.total - medians[own.rank])
    median = medians[slowest.rank]
    return {
        "rank": slowest.rank,
        "host": slowest.host,
        "data_seconds": slowest.data,
        "compute_seconds": slowest.compute,
        "peers_seconds": median,
        "percent_over": 100 * (slowest.total / median - 1) if median > 0 else 0.0,
    }


def describe(slowest: dict[str, Any]) -> str:
    """The console's line."""
    own = slowest["data_seconds"] + slowest["compute_seconds"]
    return (
        f"slowest: rank {slowest['rank']} on {slowest['host']}, {own:.3g} s of own work per step "
        f"(data {slowest['data_seconds']:.3g}, compute {slowest['compute_seconds']:.3g}), "
        f"{slowest['percent_over']:.0f}% above its peers' {slowest['peers_seconds']:.3g} s"
    )


class Stragglers:
    """Measures this rank's own time, step after step. Off (`is_on` False) it measures nothing and costs nothing."""

    def __init__(self, groups: Groups, stages: Sequence[PipelineStage], *, is_on: bool):
        self.is_on, self._device = is_on and dist.get_world_size() > 1, groups.device
        self._places: list[tuple[int, str]] = [(0, "")] * dist.get_world_size()
        self._is_in_step = False
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._reset()
        if self.is_on:
            dist.all_gather_object(self._places, (groups.pp.rank(), socket.gethostname()))
        if self.is_on and groups.device.type == "cuda":
            for stage in stages:
                stage.register_forward_pre_hook(self._begin_forward)
                stage.register_forward_hook(self._end_forward)

    def watch(self, batches: Iterable[Item]) -> Iterator[Item]:
        """`batches`, the time until each is there counted as data."""
        if not self.is_on:
            yield from batches
            return
        wall, cpu = time.perf_counter(), time.thread_time()
        for batch in batches:
            self._data += time.perf_counter() - wall
            self._cpu_of_data += time.thread_time() - cpu
            yield batch
            wall, cpu = time.perf_counter(), time.thread_time()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one training step: only what is within counts as computation."""
        if not self.is_on:
            yield
            return
        cpu, self._is_in_step = time.thread_time(), True
        yield
        self._cpu += time.thread_time() - cpu
        self._is_in_step = False

    def record(self, steps: int) -> dict[str, Any] | None:
        """`find_slowest` over the last `steps` steps; None when off. Collective, one small all-gather."""
        if not self.is_on:
            return None
        mine = torch.tensor([self._data, self._computed()], dtype=torch.float64, device=self._device) / steps
        gathered = [torch.empty_like(mine) for _ in self._places]
        dist.all_gather(gathered, mine)
        self._reset()
        return find_slowest(
            [
                OwnTime(rank, stage, host, *seconds.tolist())
                for rank, (seconds, (stage, host)) in enumerate(zip(gathered, self._places, strict=True))
            ]
        )

    def _reset(self) -> None:
        self._data = self._cpu = self._cpu_of_data = 0.0
        self._num_forwards = 0

    def _computed(self) -> float:
        """Seconds of computation since the last record. On CUDA waits for the last event."""
        if self._device.type != "cuda":
            return self._cpu - self._cpu_of_data
        pairs = self._events[: self._num_forwards]
        if pairs:
            pairs[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3

    def _begin_forward(self, *_: object) -> None:
        if not self._is_in_step:  # a validation
            return
        if self._num_forwards == len(self._events):  # events are used again after each record
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._events[self._num_forwards][0].record()

    def _end_forward(self, *_: object) -> None:
        if self._is_in_step:
            self._events[self._num_forwards][1].record()
            self._num_forwards += 1
