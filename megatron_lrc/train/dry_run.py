"""--dry-run: every check of a run, and what it will take, without starting anything.

Works on a machine without GPUs, for any number of them. What the estimates rest on is in `estimate/`; the share of the
GPUs' peak is an assumption and printed as one.
"""

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from megatron_lrc.checkpoints.run_directory import RunState
from megatron_lrc.config import (
    Config,
    ConfigError,
    DryRun,
    ModelShape,
    describe_changes,
    describe_departures,
    describe_schedule,
    describe_training,
)
from megatron_lrc.console import say
from megatron_lrc.data.counted_tokens import describe_counted_tokens
from megatron_lrc.estimate.devices import DEFAULT_GPU, GIB, Gpu, gpu_named
from megatron_lrc.estimate.disk import disk_need, trained_elements
from megatron_lrc.estimate.flops import step_flops
from megatron_lrc.estimate.peak_memory import MemoryParts, peak_memory
from megatron_lrc.estimate.plan_lines import describe_sharing
from megatron_lrc.estimate.spans import span
from megatron_lrc.estimate.speed import DEFAULT_MFU, step_time
from megatron_lrc.estimate.stage import parameter_count
from megatron_lrc.mcore.engine import too_old_for_recipe
from megatron_lrc.mcore.kernels import check_machine
from megatron_lrc.methods import Method, method_of
from megatron_lrc.methods.method import describe_depth, describe_parts, describe_tying
from megatron_lrc.train.start_checks import check


def dry_run(config: Config, wanted: DryRun, world_size: int, presets: Sequence[str] = ()) -> None:
    """Check and print. ConfigError as a run would raise it, or if memory or disk cannot hold the run.

    config: resolved for world_size GPUs. presets: the names given with --preset.
    """
    if os.environ.get("RANK", "0") != "0":  # under torchrun one process answers
        return
    method = method_of(config)
    if refusal := method.why_no_dry_run():
        raise ConfigError(refusal)
    is_for_here = not wanted.gpu and torch.cuda.is_available()
    if is_for_here:
        check_machine(config)
    checked = check(config, world_size)
    config, shape = checked.config, checked.teacher.shape
    method = method_of(config)
    student = method.student_shape(shape)
    gpu = gpu_named(wanted.gpu) if wanted.gpu else gpu_here()
    warnings = [*checked.warnings, *describe_departures(config, presets)]
    if not is_for_here and (problem := too_old_for_recipe(config)):
        warnings.append(f"{problem} So it is here; the GPUs' nodes may have another.")
    peaks, memory, time = [], iter(()), iter(())
    if method.is_estimated:
        peaks = peak_memory(config, shape, student, world_size=world_size)
        memory, mfu = describe_memory(peaks, gpu), wanted.mfu or DEFAULT_MFU
        time = describe_time(config, shape, student, world_size, gpu, mfu, checked.state.step)
    else:
        warnings = [f"memory and time are not estimated for --method {method.name}", *warnings]
    for line in itertools.chain(
        describe_changes(config),
        describe_models(method, shape, student),
        describe_layout(config, world_size, checked.state),
        filter(None, [describe_counted_tokens(config)]),
        describe_flops(config, shape, student),
        memory,
        describe_disk(config, shape, student),
        time,
        (f"warning: {warning}" for warning in warnings),
    ):
        say(line)
    if peaks:
        refuse_too_much_memory(peaks, gpu)
    refuse_too_little_disk(config, shape, student)
    say("dry run: every check passed, nothing was started")


def gpu_here() -> Gpu:
    """The kind of GPU of this machine; without one the default."""
    if not torch.cuda.is_available():
        return gpu_named(DEFAULT_GPU)
    properties = torch.cuda.get_device_properties(0)
    return Gpu(properties.name, properties.total_memory, gpu_named(DEFAULT_GPU).nvlink)


def describe_models(method: Method, teacher: ModelShape, student: ModelShape) -> Iterator[str]:
    shapes = {"teacher": teacher, "student": student} if method.is_estimated else {"model": student}
    for name, shape in shapes.items():
        yield (
            f"{name}: {parameter_count(shape) / 1e9:.2f}B parameters, {'' if method.is_estimated else 'all trained, '}"
            f"hidden size {shape.hidden_size}, {describe_depth(shape)}{describe_parts(shape, teacher)}, "
            f"{describe_tying(shape)}"
        )

    def count(has_changed: bool) -> int:
        return trained_elements(teacher, student, method.own_matrices(has_changed=has_changed))

    if method.is_estimated:
        yield from method.describe_trained(count)


def describe_layout(config: Config, world_size: int, state: RunState) -> Iterator[str]:
    yield f"layout: {config.describe_layout(world_size, f'{world_size} GPUs')}"
    yield f"training: {describe_training(config.training, step=state.step, consumed_tokens=state.tokens)}"
    if config.decay_iters:
        yield describe_schedule(config.optimizer, config.decay_iters)


def describe_flops(config: Config, teacher: ModelShape, student: ModelShape) -> Iterator[str]:
    flops = step_flops(config, teacher, student)
    assert config.training.global_batch_size is not None
    tokens = config.training.global_batch_size * config.training.seq_length
    yield "FLOPs (2 per multiply-add)      per token     per step"
    parts = {field.name.replace("_", " "): getattr(flops, field.name) for field in fields(flops)}
    for name, value in (parts | {"total": flops.total}).items():
        yield f"  {name:<28}{value / tokens:>11.3e}  {value:>11.3e}"


def describe_memory(peaks: list[MemoryParts], gpu: Gpu) -> Iterator[str]:
    """The fullest pipeline stage by part; the others by their total."""
    fullest = max(peaks, key=lambda peak: peak.total)
    where = f" (of pipeline stage {peaks.index(fullest)}, the fullest)" if len(peaks) > 1 else ""
    yield f"memory per GPU, GiB{where}"
    for field in fields(fullest):
        yield f"  {field.name.replace('_', ' '):<28}{getattr(fullest, field.name) / GIB:>7.2f}"
    yield f"  {'total':<28}{fullest.total / GIB:>7.2f}  of {gpu.memory / GIB:.1f} on {gpu.name}"
    if len(peaks) > 1:
        yield f"  by stage: {' '.join(f'{peak.total / GIB:.1f}' for peak in peaks)}"


def describe_disk(config: Config, teacher: ModelShape, student: ModelShape) -> Iterator[str]:
    need = disk_need(config, teacher, student)
    if config.checkpoint.save is None:
        yield "disk: nothing is saved, for want of --save"
        return
    free = free_space(config.checkpoint.save)
    yield (
        f"disk: a checkpoint takes {need.one / 1e9:.2f} GB; {need.count} kept and one being written, "
        f"{need.total / 1e9:.1f} GB; free at --save {config.checkpoint.save}: {free / 1e9:.1f} GB"
    )
    if need.one * 2 <= free < need.total:
        yield (
            f"warning: the checkpoints of the whole run do not fit into the {free / 1e9:.1f} GB that are free. "
            "Use --keep-last, or a larger --save-interval."
        )


def describe_time(
    config: Config, teacher: ModelShape, student: ModelShape, world_size: int, gpu: Gpu, mfu: float, done: int
) -> Iterator[str]:
    """done: steps that a run to be continued has behind it."""
    time = step_time(config, teacher, student, world_size=world_size, gpu=gpu, mfu=mfu)
    left = config.train_iters - done
    yield (
        f"time: {span(time.total * left)} for {left:,} steps, {time.tokens_per_second:.0f} tokens/s, if "
        f"{gpu.name} computes at {mfu:.0%} of its peak (assumed; --mfu) and links run as assumed; bubble "
        f"{time.bubble_fraction:.0%}, communication {time.communication / time.total:.0%}"
    )
    yield from describe_sharing(config, teacher, student, world_size=world_size, gpu=gpu, mfu=mfu)


def refuse_too_much_memory(peaks: list[MemoryParts], gpu: Gpu) -> None:
    """ConfigError if a GPU cannot hold its part."""
    total = max(peak.total for peak in peaks)
    if total > gpu.memory:
        raise ConfigError(
            f"An estimated {total / GIB:.1f} GiB per GPU do not fit into the {gpu.memory / GIB:.1f} GiB of {gpu.name}. "
            "Use a layout that tools/plan.py finds: a smaller --micro-batch-size, --recompute-granularity full, or "
            "more --tensor-model-parallel-size or --pipeline-model-parallel-size."
        )


def refuse_too_little_disk(config: Config, teacher: ModelShape, student: ModelShape) -> None:
    """ConfigError if the disk cannot hold even one checkpoint and its successor."""
    if config.checkpoint.save is None:
        return
    need, free = disk_need(config, teacher, student), free_space(config.checkpoint.save)
    if min(need.count + 1, 2) * need.one > free:
        raise ConfigError(
            f"--save {config.checkpoint.save} has {free / 1e9:.2f} GB free, and a checkpoint takes "
            f"{need.one / 1e9:.2f} GB, twice that while the next one is written. Give a directory on a larger disk."
        )


def free_space(run: str) -> float:
    """Bytes, of the file system on which a directory is or would be made."""
    path = Path(run).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
