"""What `megatron-lrc plan` says of the layouts that were found: the table, the budget, and what stands in the way; and
of --share-compose what --dry-run says too."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_lrc.config import (
    Config,
    ModelShape,
    describe_departures,
    describe_schedule,
    describe_training,
    is_counted,
)
from megatron_lrc.estimate.communication import sharing_replicas
from megatron_lrc.estimate.devices import GIB, Gpu
from megatron_lrc.estimate.search import LARGER, Plan
from megatron_lrc.estimate.speed import step_time
from megatron_lrc.estimate.stage import stages_of


def table(plans: Sequence[Plan]) -> Iterator[str]:
    yield "TP PP CP  DP  micro-batches  recompute      dist.opt.  GiB/GPU  bubble  comm.   tokens/s   hours    days"
    for plan in plans:
        numbers, time = plan.numbers(), plan.time
        duration = "      -       -" if plan.hours is None else f"{plan.hours:>7.1f} {plan.hours / 24:>7.1f}"
        yield (
            f"{numbers['tensor_model_parallel_size']:>2} {numbers['pipeline_model_parallel_size']:>2} "
            f"{numbers['context_parallel_size']:>2} {numbers['data_parallel_size']:>3}  "
            f"{numbers['num_microbatches']:>6} of {numbers['micro_batch_size']:<3}  {plan.recompute:<14} "
            f"{'yes' if numbers['use_distributed_optimizer'] else 'no':<9} {plan.memory.total / GIB:>8.1f} "
            f"{time.bubble_fraction:>7.0%} {time.communication / time.total:>6.0%} "
            f"{time.tokens_per_second:>10.0f} {duration}"
        )


def describe_budget(plan: Plan, presets: Sequence[str]) -> Iterator[str]:
    """Tokens, steps and hours of a layout, and what of it is not the preset's."""
    if plan.hours is None:
        yield "training: no hours, for want of --train-tokens, --train-samples or --train-iters"
        return
    yield f"training: {describe_training(plan.config.training)}; {plan.hours:.1f} hours with the first layout"
    yield describe_schedule(plan.config.optimizer, plan.config.decay_iters)
    yield from (f"warning: {departure}" for departure in describe_departures(plan.config, presets))


def compare_with_next(plans: Sequence[Plan]) -> Iterator[str]:
    """What the first layout costs and gains against the second."""
    if len(plans) == 1:
        return
    first, second = plans[:2]
    faster = first.time.tokens_per_second / second.time.tokens_per_second - 1
    more = (first.memory.total - second.memory.total) / GIB
    speed = f"{abs(faster):.1%} {'faster' if faster > 0 else 'slower'}" if abs(faster) >= 0.0005 else "as fast"
    memory = f"{abs(more):.1f} GiB {'more' if more >= 0 else 'less'} per GPU"
    yield f"against the second, the first is {speed} and takes {memory}; the second is {second.flags()}"


def describe_sharing(
    config: Config, teacher: ModelShape, student: ModelShape, *, world_size: int, gpu: Gpu, mfu: float
) -> Iterator[str]:
    """What --share-compose gains, or would, where there are replicas to share with and something is composed."""
    is_on = config.parallel.share_compose
    plain, shared = (
        replace(config, parallel=replace(config.parallel, share_compose=is_shared)) for is_shared in (False, True)
    )
    replicas = sharing_replicas(shared, world_size)
    if replicas > 1 and any(stage.composed_elements for stage in stages_of(config, teacher, student)):
        before, after = (
            step_time(each, teacher, student, world_size=world_size, gpu=gpu, mfu=mfu) for each in (plain, shared)
        )
        yield (
            f"--share-compose, for the {replicas} replicas of a node: a step {'takes' if is_on else 'would take'} "
            f"{after.total * 1e3:.0f} ms instead of {before.total * 1e3:.0f} ({before.total / after.total - 1:.1%} "
            f"faster), {after.communication * 1e3:.0f} ms of it waiting for communication instead of "
            f"{before.communication * 1e3:.0f}"
        )
    elif is_on:
        yield "--share-compose does nothing here: a node has one replica, or nothing is composed"


def describe_batch(plan: Plan, larger: Plan | None) -> Iterator[str]:
    """Where the pipeline waits: that the batch is why, and what a larger one would gain."""
    time, training = plan.time, plan.config.training
    stages = plan.config.parallel.pipeline_model_parallel_size
    waits = (
        f"--global-batch-size {training.global_batch_size} makes {plan.config.num_microbatches(plan.world_size)} "
        f"micro-batches for {stages} pipeline stages, which wait {time.bubble_fraction:.0%} of the time"
    )
    if larger is not None:
        gain = larger.time.tokens_per_second / time.tokens_per_second - 1
        hours = f", {larger.hours:.1f} hours" if is_counted(training) and larger.hours is not None else ""
        yield (
            f"the batch limits: {waits}. --global-batch-size {larger.config.training.global_batch_size} would be "
            f"{gain:.0%} faster ({larger.time.tokens_per_second:.0f} tokens/s{hours}) with {larger.flags()}"
        )
    elif plan.bubble_of_batch:
        yield f"{waits}; a batch up to {LARGER[-1]} times as large gains nothing"
