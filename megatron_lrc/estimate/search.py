"""Layouts of a run on a number of GPUs, each with its memory and speed as estimated; what is not allowed is left out.

Which layouts are allowed is asked of `layout_checks.py` and `validation.py`, so that what is found here also starts.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_lrc.config import (
    Config,
    ConfigError,
    ModelShape,
    check_batches,
    check_layout,
    divisors,
    propose_batches,
    validate_against_teacher,
)
from megatron_lrc.estimate.devices import GIB, GPUS_PER_NODE, Gpu
from megatron_lrc.estimate.peak_memory import MemoryParts, peak_memory
from megatron_lrc.estimate.speed import StepTime, step_time
from megatron_lrc.mcore.student_stages import check_student_stages
from megatron_lrc.methods import method_of

MICRO_BATCHES = (1, 2, 3, 4, 8, 16)
#: Share of a step that a pipeline may wait before a larger batch is looked at.
LARGE_BUBBLE = 0.05
#: How many times larger a batch is tried.
LARGER = (2, 4, 8, 16)
#: Share by which it has to be faster to be worth a word, and of the fastest one's speed that is fast enough.
WORTHWHILE, ENOUGH = 1.05, 0.95
#: How often a model is split, in which way.
SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
RECOMPUTATION = (
    {"recompute_granularity": None, "recompute_modules": ["core_attn"]},
    {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    {"recompute_granularity": "full", "recompute_modules": ["core_attn"]},
)


@dataclass(frozen=True, slots=True)
class Plan:
    """One layout. memory: the fullest pipeline stage's peak."""

    config: Config
    world_size: int
    memory: MemoryParts
    time: StepTime

    @property
    def hours(self) -> float | None:
        """For the whole budget; None where steps are not known: without a budget, or in epochs of unread data."""
        steps = self.config.training.train_iters
        return None if steps is None else self.time.total * steps / 3600

    @property
    def bubble_of_batch(self) -> bool:
        """Whether the pipeline waits for want of micro-batches."""
        stages = self.config.parallel.pipeline_model_parallel_size
        return stages > 1 and (
            self.time.bubble_fraction > LARGE_BUBBLE or self.config.num_microbatches(self.world_size) < stages
        )

    @property
    def recompute(self) -> str:
        parallel = self.config.parallel
        modules = f" {' '.join(parallel.recompute_modules)}" if parallel.recompute_granularity == "selective" else ""
        return f"{parallel.recompute_granularity or 'none'}{modules}"

    def flags(self) -> str:
        """What the search has chosen, as flags."""
        parallel, training = self.config.parallel, self.config.training
        sizes = {name: getattr(parallel, name) for name in SIZES}
        chosen = [
            f"--{name.replace('_', '-')} {size}"
            for name, size in sizes.items()
            if size > 1 or name == "tensor_model_parallel_size"  # which presets set
        ]
        chosen += [f"--micro-batch-size {training.micro_batch_size}"]
        if parallel.recompute_granularity:
            chosen.append(f"--recompute-granularity {parallel.recompute_granularity}")
        if parallel.recompute_granularity == "selective":
            chosen.append(f"--recompute-modules {' '.join(parallel.recompute_modules)}")
        chosen.append(f"--{'' if parallel.use_distributed_optimizer else 'no-'}use-distributed-optimizer")
        overlaps = ("overlap_grad_reduce", "overlap_param_gather", "share_compose")
        chosen += [f"--{name.replace('_', '-')}" for name in overlaps if getattr(parallel, name)]
        return " ".join(chosen)

    def numbers(self) -> dict[str, Any]:
        """Everything, by plain names, for JSON. Bytes, seconds."""
        parallel, training = self.config.parallel, self.config.training
        return {
            **{name: getattr(parallel, name) for name in SIZES},
            "data_parallel_size": self.config.data_parallel_size(self.world_size),
            "micro_batch_size": training.micro_batch_size,
            "num_microbatches": self.config.num_microbatches(self.world_size),
            "recompute": self.recompute,
            "use_distributed_optimizer": parallel.use_distributed_optimizer,
            "memory_bytes": {**asdict(self.memory), "total": self.memory.total},
            "step_seconds": {**asdict(self.time), "total": self.time.total},
            "bubble_fraction": self.time.bubble_fraction,
            "tokens_per_second": self.time.tokens_per_second,
            "tokens": None if training.train_iters is None else training.train_iters * self.time.tokens,
            "steps": training.train_iters,
            "hours": self.hours,
            "days": None if self.hours is None else self.hours / 24,
            "flags": self.flags(),
        }


def find_plans(
    config: Config,
    teacher: ModelShape,
    student: ModelShape,
    *,
    world_size: int,
    gpu: Gpu,
    mfu: float,
    micro_batches: Sequence[int] = MICRO_BATCHES,
) -> list[Plan]:
    """Every allowed layout whose estimated peak the GPU holds, the fastest first. ConfigError if there is none.

    micro_batches: the sizes to try. config: what is searched (`candidates`) is overwritten in it; the rest of it holds
    for every layout.
    """
    plans = []
    for candidate in candidates(config, teacher, world_size, micro_batches):
        resolved = candidate.resolved(world_size)
        peaks = peak_memory(resolved, teacher, student, world_size=world_size)
        time = step_time(resolved, teacher, student, world_size=world_size, gpu=gpu, mfu=mfu)
        plans.append(Plan(resolved, world_size, max(peaks, key=lambda peak: peak.total), time))
    if not plans:
        raise ConfigError(
            f"No layout of {world_size} GPUs goes with --global-batch-size {config.training.global_batch_size} and "
            f"--seq-length {config.training.seq_length}. {_fitting_batches(config, world_size)}."
        )
    fitting = [plan for plan in plans if plan.memory.total <= gpu.memory]
    if not fitting:
        smallest = min(plans, key=lambda plan: plan.memory.total)
        raise ConfigError(
            f"No layout of {world_size} GPUs fits into the {gpu.memory / GIB:.1f} GiB of {gpu.name}; the smallest is "
            f"{smallest.flags()} with {smallest.memory.total / GIB:.1f} GiB. Use more GPUs or larger ones."
        )
    return sorted(fitting, key=_rank)


def larger_batch(best: Plan, teacher: ModelShape, student: ModelShape, *, gpu: Gpu, mfu: float) -> Plan | None:
    """The fastest layout with a larger batch, where the batch is what limits `best`: the smallest of 2 to 16 times
    that comes near the fastest of them. None where the batch does not limit, or more of it gains nothing."""
    batch_size = best.config.training.global_batch_size
    if batch_size is None or not best.bubble_of_batch:
        return None
    found = []
    for times in LARGER:
        config = replace(best.config, training=replace(best.config.training, global_batch_size=batch_size * times))
        wanted = {
            "world_size": best.world_size,
            "gpu": gpu,
            "mfu": mfu,
            "micro_batches": (1,),
        }  # the estimate's fastest
        found.append(find_plans(config, teacher, student, **wanted)[0])
    fastest = max(plan.time.tokens_per_second for plan in found)
    if fastest < WORTHWHILE * best.time.tokens_per_second:
        return None
    return next(plan for plan in found if plan.time.tokens_per_second >= ENOUGH * fastest)


def _fitting_batches(config: Config, world_size: int) -> str:
    """What to do: the nearest batches that every data-parallel size divides."""
    batch_size = config.training.global_batch_size
    if batch_size is None:
        return "Use a --seq-length that the GPUs can share"
    return propose_batches(config, batch_size, world_size)


def _rank(plan: Plan) -> tuple:
    """By speed; what the estimate cannot tell apart (two digits) by how few things are split, then by memory."""
    parallel, speed = plan.config.parallel, float(f"{plan.time.tokens_per_second:.2g}")
    tp, pp, cp = (getattr(parallel, size) for size in SIZES)
    return -speed, tp * pp * cp, (cp, pp, tp), plan.memory.total


def candidates(
    config: Config, teacher: ModelShape, world_size: int, micro_batches: Sequence[int] = MICRO_BATCHES
) -> Iterator[Config]:
    """Every allowed layout: TP within a node, PP, CP, micro-batch size, recomputation, distributed optimizer; over
    nodes with the overlap flags."""
    tensor = [size for size in divisors(world_size) if size <= 8]
    pipeline = [size for size in divisors(world_size) if size <= teacher.num_layers]
    context = [size for size in divisors(world_size) if size <= 8]
    for tp, pp, cp, micro_batch in itertools.product(tensor, pipeline, context, micro_batches):
        sizes = dict(zip(SIZES, (tp, pp, cp), strict=True))
        parallel = replace(config.parallel, **sizes, sequence_parallel=None)
        parallel = replace(parallel, recompute_method="uniform", recompute_num_layers=1)
        training = replace(config.training, micro_batch_size=micro_batch)
        layout = replace(config, parallel=parallel, training=training)
        if not _is_allowed(layout, teacher, world_size):
            continue
        shardings = (True, False) if world_size > tp * pp else (False,)
        for is_sharded in shardings:
            sharded = replace(layout, parallel=replace(parallel, use_distributed_optimizer=is_sharded))
            sharded = _overlapped(sharded, teacher, world_size)
            for recompute in RECOMPUTATION:
                yield replace(sharded, parallel=replace(sharded.parallel, **recompute))


def _overlapped(config: Config, teacher: ModelShape, world_size: int) -> Config:
    """With what replicas exchange beside the computation, where they are on several nodes and it is allowed."""
    parallel = config.parallel
    if world_size // parallel.pipeline_model_parallel_size <= GPUS_PER_NODE:
        return config
    gathers = parallel.use_distributed_optimizer
    overlapped = replace(config, parallel=replace(parallel, overlap_grad_reduce=True, overlap_param_gather=gathers))
    return overlapped if _is_allowed(overlapped, teacher, world_size) else config


def _is_allowed(config: Config, teacher: ModelShape, world_size: int) -> bool:
    if any(check_layout(config, world_size)) or any(check_batches(config, world_size)):
        return False
    try:
        method = method_of(config)
        validate_against_teacher(method, teacher)
        check_student_stages(config, teacher, method.student_shape(teacher))
    except ConfigError:
        return False
    return True
