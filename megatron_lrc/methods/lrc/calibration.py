"""The first values of the projections, as --init says, and constants of the clone loss; calibration: the first training
tokens through the models.

Activations are never kept: each micro-batch adds to moments as it goes by. Every rank sees its own tokens and layers,
so moments are partial sums, over the world or over the ranks of a pipeline stage.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lrc.clone.initialization import (
    OutputRatios,
    SecondMoment,
    initialize_from_basis,
    initialize_random,
    norm_before,
    random_basis,
)
from megatron_lrc.clone.ridge import ReadingMoments
from megatron_lrc.clone.sites import WRITER_BEFORE
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.hf.released_projections import ReleasedProjections
from megatron_lrc.mcore.distributed import (
    broadcast_from_first,
    broadcast_over_stage,
    reduce_over_stage,
    sum_over_stage,
    sum_over_world,
)
from megatron_lrc.mcore.schedules import forward_backward
from megatron_lrc.methods.lrc.paired_model import PairedModel

Batches = Iterator[dict[str, Tensor]]
Reader = tuple[nn.Module, Callable[[Tensor], None]]


def initialize(config: Config, stages: list[PairedModel], calibration: Callable[[], Batches]) -> None:
    """Give every projection its first value. `calibration` opens the training data from its start."""
    projection, seed = config.projection, config.training.seed
    if projection.init == "random":
        for stage in stages:
            initialize_random(stage.projections, std=projection.init_method_std, seed=seed)
        return
    shapes = stages[0].shapes
    if projection.init == "released":
        assert projection.released_checkpoint is not None, "check_models() has passed"
        take_over(ReleasedProjections(projection.released_checkpoint, shapes.teacher, shapes.student), stages)
        return
    if projection.init == "orthogonal":
        basis = random_basis(shapes.teacher.hidden_size, shapes.student.hidden_size, seed=seed)
    else:
        basis = residual_basis(config, stages, calibration())
    # From one rank: a decomposition may differ between machines.
    basis = broadcast_from_first(basis.to(stages[0].groups.device))
    for stage in stages:
        gains = stage.teacher_gains()
        initialize_from_basis(stage.projections, basis, gains, embedding_ratio=stage.embedding_ratio)
    if projection.init == "ridge":
        fit_to_readings(config, stages, basis, calibration())
    if projection.init != "orthogonal" and stages[0].shapes.teacher.has_norms_after:
        fit_output_gains(config, stages, calibration())


def take_over(released: ReleasedProjections, stages: list[PairedModel]) -> None:
    """Give projections and gains the values that the first rank reads, so that no two ranks have other ones."""
    shapes, groups = stages[0].shapes, stages[0].groups
    for name in released.names():
        width = shapes.student.hidden_size
        size = (width,) if released.is_gain(name) else (shapes.teacher.hidden_size, width)
        value = torch.empty(size, dtype=torch.float32, device=groups.device)
        if dist.get_rank() == 0:
            value.copy_(released.read(name))
        broadcast_from_first(value)
        for stage in stages:
            if name in dict(stage.projections.named_matrices()):
                stage.projections.set_matrix(name, value)
            elif name in dict(stage.projections.named_norms()):
                stage.projections.set_gain(name, value)


def residual_basis(config: Config, stages: list[PairedModel], batches: Batches) -> Tensor:
    """Q [D, d], fp64: directions, or channels, of the teacher's residual stream, computed from all ranks' tokens."""
    shapes = stages[0].shapes
    moment = SecondMoment(shapes.teacher.hidden_size, stages[0].groups.device)
    readers = [(reader, moment.add) for stage in stages for _, reader in stage.readings()]
    run_teacher(config, stages, batches, readers)
    sum_over_world(moment.total)
    if config.projection.init == "channel":
        return moment.largest_channels(shapes.student.hidden_size)
    return moment.leading_eigenvectors(shapes.student.hidden_size)


def fit_to_readings(config: Config, stages: list[PairedModel], basis: Tensor, batches: Batches) -> None:
    """Fit each P behind a norm to what the teacher reads there. basis: Q [D, d], fp64, the same on every rank."""
    shapes = stages[0].shapes
    epsilons = (shapes.teacher.norm_epsilon, shapes.student.norm_epsilon)
    readers, moments = [], []
    for stage in stages:
        gains = stage.teacher_gains()
        for norm, reader in stage.readings():
            moment = ReadingMoments(basis, gains.get(norm), epsilons)
            readers.append((reader, partial(_add_reading, moment, stage)))
            moments.append((stage.projections, norm, moment))
    followed = [hook for stage in stages for hook in stage.missing.follow(basis)]
    run_teacher(config, stages, batches, readers)
    for hook in followed:
        hook.remove()
    for turn, (projections, norm, moment) in enumerate(moments):
        is_owner = reduce_over_stage(moment.total, turn)
        fitted = moment.fit() if is_owner else torch.empty_like(basis)
        broadcast_over_stage(fitted, turn)
        for name, _ in projections.named_matrices():
            if norm_before(name) == norm:
                projections.set_matrix(name, fitted)


def fit_output_gains(config: Config, stages: list[PairedModel], batches: Batches) -> None:
    """Multiply the gains of norms of what blocks give by what the closed form leaves to measure (`OutputRatios`)."""
    shapes = stages[0].shapes
    epsilons = (shapes.teacher.norm_epsilon, shapes.student.norm_epsilon)
    readers, measured = [], []
    for stage in stages:
        for norm, module in stage.norms_after():
            layer, _, kind = norm.rpartition(".")
            ratios = OutputRatios(stage.projections.full(f"{layer}.{WRITER_BEFORE[kind]}"), epsilons)
            readers.append((module, ratios.add))
            measured.append((stage.projections, norm, ratios))
    run_teacher(config, stages, batches, readers)
    for projections, norm, ratios in measured:
        total, count = broadcast_over_stage(sum_over_stage(ratios.total), turn=0)
        projections.set_gain(norm, projections.effective_gain(norm) * (total / count))


def _add_reading(moment: ReadingMoments, stage: PairedModel, stream: Tensor) -> None:
    moment.add(stream, stage.missing.added)


def calibrate_losses(config: Config, stages: list[PairedModel], calibration: Callable[[], Batches]) -> None:
    """Give the constants of the losses between layers their values, if the teacher has not run for another reason."""
    if not all(stage.layer_losses.is_calibrated for stage in stages):
        run_teacher(config, stages, calibration(), readers=[])


def run_teacher(
    config: Config,
    stages: list[PairedModel],
    batches: Batches,
    readers: list[Reader],
    *,
    calibrates_losses: bool = True,
) -> None:
    """Run the calibration's tokens through the teacher, and give each reader's input [s/tp, b, D] to its function.
    calibrates_losses: the first time the constants of the losses come of it too."""
    hooks = [reader.register_forward_pre_hook(partial(_look_at_input, look)) for reader, look in readers]
    tokens_at_once = config.training.micro_batch_size * config.training.seq_length * stages[0].groups.dp.size()
    num_microbatches = -(-config.projection.calibration_tokens // tokens_at_once)
    try:
        with contextlib.ExitStack() as calibrating:
            for losses in (stage.layer_losses for stage in stages):
                if calibrates_losses and not losses.is_calibrated:
                    calibrating.enter_context(losses.calibrating())
            forward_teacher(stages, batches, config, num_microbatches=num_microbatches)
    except StopIteration:
        raise ConfigError(
            f"--calibration-tokens {config.projection.calibration_tokens} is more than the training data holds. "
            "Use fewer."
        ) from None
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def forward_teacher(stages: list[PairedModel], batches: Batches, config: Config, *, num_microbatches: int) -> None:
    """Run only the teacher over some micro-batches (calibration: whoever needs its activations has hooks in place)."""
    forward_backward(
        stages,
        batches,
        config,
        num_microbatches=num_microbatches,
        forward_only=True,
        forward_step=PairedModel.forward_teacher,
    )


def _look_at_input(look: Callable[[Tensor], None], module: nn.Module, inputs: tuple) -> None:
    look(inputs[0])
