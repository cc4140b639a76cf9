"""Stage 4: steps at the sizes of the preset lrc-1.5b, and where their time and memory go.

The teacher's weights are drawn on the device: what they are changes no speed. Three micro-batches are a step, as in the
published run on eight GPUs. With micro-batches of 1 a step is likely to be bound by the host, which has to enqueue
every operation; so the time until all is enqueued is measured beside the time until all is done.
"""

import argparse
import collections
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.breakdown import breakdown
from benchmarks.gpu_check.checks import Check, Checks, Figures, need_cuda
from benchmarks.gpu_check.drawn_weights import DrawnWeights, draw_projections
from benchmarks.gpu_check.left_behind import forget_scaling_state, free_memory
from benchmarks.gpu_check.possible import need_support
from benchmarks.gpu_check.settings import Settings
from benchmarks.gpu_check.small_teacher import teacher_of
from benchmarks.measure import synchronize
from benchmarks.measured_models import build_run, open_base, same_batch
from benchmarks.step_benchmark import gemm_rate
from megatron_lrc.config import Config, parse_config
from megatron_lrc.estimate.flops import step_flops
from megatron_lrc.estimate.peak_memory import peak_memory
from megatron_lrc.hf.families import TeacherDescription
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.kernels import describe_kernels
from megatron_lrc.mcore.optimizer import parameter_dtype
from megatron_lrc.methods import method_of
from megatron_lrc.train.process_memory import memory_bytes
from megatron_lrc.train.step import Batches, Run, Votes, train_step

TEACHER = "Llama-3.2-3B-Instruct"
NUM_MICROBATCHES = 3
BOTH_FP8 = ["--fp8-format", "hybrid", "--teacher-fp8"]
#: In the order in which they are worth knowing. There is no FP8 of the teacher alone.
PRECISIONS: dict[str, list[str]] = {"bf16": [], "both in FP8": BOTH_FP8, "student in FP8": BOTH_FP8[:2]}
MICRO_BATCH_SIZES = (3, 1)
LONGEST = 25
GIB = 2**30


def checks(settings: Settings) -> Checks:
    yield Check("GEMM of 8192^3 in bf16", lambda: gemm(settings))
    with ExitStack() as at_the_end:
        base = describe_teacher_of(settings)
        groups = distributed.start(config_of(settings, base, []))
        at_the_end.callback(distributed.stop)
        bench = Bench(settings, base, groups)
        for precision in PRECISIONS:
            for size in MICRO_BATCH_SIZES:
                name = f"{precision}, micro-batches of {size}"
                yield Check(name, lambda precision=precision, size=size: bench.speed(precision, size))
            yield Check(f"{precision}: longest kernels", lambda precision=precision: bench.kernels(precision))
            yield Check(f"{precision}: parts of a step", lambda precision=precision: bench.parts(precision))
        bench.forget()


def gemm(settings: Settings) -> Figures:
    need_cuda(settings)
    return {"TFLOP/s": gemm_rate(torch.bfloat16, torch.device(settings.device)) / 1e12}


def describe_teacher_of(settings: Settings) -> TeacherDescription:
    """Its sizes: the published run's, or the small model's."""
    shape, config = (None, teacher_of(settings)) if settings.is_tiny else (TEACHER, None)
    return open_base(argparse.Namespace(teacher=None, shape=shape, teacher_config=config))[0]


def config_of(settings: Settings, base: TeacherDescription, flags: list[str]) -> Config:
    """Of the published run, on one GPU; with --tiny at the sizes of the small model."""
    size = MICRO_BATCH_SIZES[0]
    given = ["--preset", "lrc-1.5b", "--teacher", str(base.directory), *flags]
    given += ["--micro-batch-size", str(size), "--global-batch-size", str(size * NUM_MICROBATCHES)]
    if settings.is_tiny:
        given += ["--student-hidden-size", str(settings.sizes.student), "--seq-length", str(settings.sizes.sequence)]
    return parse_config(given).resolved(1)


@dataclass(frozen=True)
class Times:
    """Seconds of a step. enqueued: until the host has everything up to the pull back on its way. done: until the device
    has done that. all: until the step is over, which waits for the device twice."""

    enqueued: float
    done: float
    all: float


class Bench:
    """One model at a time, in one of the precisions, and what is measured of it."""

    def __init__(self, settings: Settings, base: TeacherDescription, groups: distributed.Groups):
        self._settings, self._base, self._groups = settings, base, groups
        self._device = groups.device
        self._present: tuple[str, Run, int] | None = None  # precision, run, bytes in use before it was built

    def forget(self) -> None:
        self._present = None
        forget_scaling_state()
        free_memory()

    def run_of(self, precision: str, size: int) -> Run:
        """Built if it is not the present one; its micro-batches from now on of `size` sequences."""
        need_support(self._settings, config_of(self._settings, self._base, PRECISIONS[precision]))
        if self._present is None or self._present[0] != precision:
            self.forget()
            before = memory_bytes(self._device)[1]
            self._present = (precision, self._build(PRECISIONS[precision]), before)
        run = self._present[1]
        run.config.training.micro_batch_size = size
        run.config.training.global_batch_size = size * NUM_MICROBATCHES
        return run

    def _build(self, flags: list[str]) -> Run:
        config = config_of(self._settings, self._base, flags)
        reader = DrawnWeights(self._base, self._base.shape, self._device)
        run = build_run(config, self._base, reader, self._groups, iter(()), is_new=False)
        draw_projections(run)
        return run

    def batches_of(self, run: Run) -> Batches:
        return same_batch(run.config, self._base.shape.vocab_size, self._device)

    def speed(self, precision: str, size: int) -> Figures:
        """Medians of some steps, after two that compile and warm up."""
        run = self.run_of(precision, size)
        batches = self.batches_of(run)
        for _ in range(2):
            report = train_step(run, batches)
        tokens = size * NUM_MICROBATCHES * run.config.training.seq_length
        assert report.is_updated and report.losses.tokens.item() == tokens, "the step was skipped, or not of all tokens"
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        times = [timed_step(run, batches, self._device) for _ in range(2 if self._settings.is_tiny else 5)]
        student = method_of(run.config).student_shape(self._base.shape)
        seconds = median(each.all for each in times)
        return {
            "tokens/s": tokens / seconds,
            "TFLOP/s": step_flops(run.config, self._base.shape, student).total / seconds / 1e12,
            "seconds": seconds,
            "slowest": max(each.all for each in times),
            "enqueued": median(each.enqueued for each in times),
            "done": median(each.done for each in times),
            **self._memory(run, student),
            **(count_waits(run, batches) if self._device.type == "cuda" else {}),
            "layers": describe_kernels(run.config, parameter_dtype(run.config), student, "student", run.optimizer.kind)
            or "megatron-core's own",
        }

    def _memory(self, run: Run, student: Any) -> Figures:
        """On a CPU the process's, with what it takes without models."""
        is_cuda = self._device.type == "cuda"
        assert self._present is not None
        (estimate,) = peak_memory(
            run.config, self._base.shape, student, world_size=1, runtime=None if is_cuda else self._present[2]
        )
        found = {"GiB": memory_bytes(self._device)[0] / GIB, "GiB estimated": (estimate.total - estimate.runtime) / GIB}
        if is_cuda:
            free, total = torch.cuda.mem_get_info(self._device)
            found |= {"GiB with allocator and CUDA": (total - free) / GIB, "GiB estimated with": estimate.total / GIB}
        return found

    def kernels(self, precision: str) -> Figures:
        """Those of one step that take longest, all calls of each together; on a CPU torch's operators."""
        run = self.run_of(precision, MICRO_BATCH_SIZES[0])
        batches = self.batches_of(run)
        train_step(run, batches)
        synchronize(self._device)
        is_cuda = self._device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiled:
            train_step(run, batches)
            synchronize(self._device)
        times = {
            each: each.self_device_time_total if is_cuda else each.self_cpu_time_total
            for each in profiled.key_averages()
        }
        micros = {each: time for each, time in times.items() if time}  # without what the host did about them
        longest = sorted(micros, key=lambda each: micros[each], reverse=True)[:LONGEST]
        total = sum(micros.values())
        return {
            "launches": sum(each.count for each in micros),
            "seconds": total / 1e6,
            "longest": [
                f"{micros[each] / 1e3:9.2f} ms {micros[each] / total:6.1%} {each.count:6} x {each.key[:100]}"
                for each in longest
            ],
        }

    def parts(self, precision: str) -> Figures:
        """Seconds of each part. Last: its hooks stay in the model."""
        run = self.run_of(precision, MICRO_BATCH_SIZES[0])
        found = breakdown(run, self.batches_of(run), 1 if self._settings.is_tiny else 3)
        return {name: median(seconds) for name, seconds in found.items()}


def timed_step(run: Run, batches: Batches, device: torch.device) -> Times:
    """The votes are asked for as soon as the pull back is enqueued."""
    is_cuda = device.type == "cuda"
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if is_cuda else []
    noted: list[float] = []

    def note() -> Votes:
        noted.append(time.perf_counter())
        if events:
            events[1].record()
        return Votes()

    synchronize(device)
    start = time.perf_counter()
    if events:
        events[0].record()
    train_step(run, batches, votes=note)
    synchronize(device)
    end = time.perf_counter()
    done = events[0].elapsed_time(events[1]) / 1e3 if events else noted[0] - start
    return Times(noted[0] - start, done, end - start)


def count_waits(run: Run, batches: Batches) -> Figures:
    """How often the host waits for the device in a step, by torch's own warnings, and where: before the pull back is
    enqueued, which should not happen, and after it."""
    counts: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def note() -> Votes:
            counts.append(len(_waits(caught)))
            return Votes()

        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_step(run, batches, votes=note)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = _waits(caught)
    places = collections.Counter(f"{'/'.join(Path(one.filename).parts[-3:])}:{one.lineno}" for one in waits)
    return {
        "waits": counts[0],
        "waits at the end": len(waits) - counts[0],
        "waits at": [f"{count:6} x {place}" for place, count in places.most_common()],
    }


def _waits(caught: list[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    return [one for one in caught if "synchronizing CUDA operation" in str(one.message)]
