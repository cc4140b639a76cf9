"""The first values of the projections, as --init says; calibration: the first training tokens through the models.

Activations are never kept: each micro-batch adds to moments as it goes by. Every rank sees its own tokens and layers,
so moments are partial sums, over the world or over the ranks of a pipeline stage.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from megatron_lrc.clone.initialization import SecondMoment, initialize_from_basis, initialize_random, random_basis
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.mcore.distributed import Groups, broadcast_from_first, sum_over_world
from megatron_lrc.mcore.models import norm_gains, residual_readers
from megatron_lrc.mcore.paired_model import PairedModel
from megatron_lrc.mcore.schedules import forward_teacher

Batches = Iterator[dict[str, Tensor]]


def initialize(config: Config, stages: list[PairedModel], calibration: Callable[[], Batches], groups: Groups) -> None:
    """Give every projection its first value. `calibration` opens the training data from its start."""
    projection, seed = config.projection, config.training.seed
    if projection.init == "random":
        for stage in stages:
            initialize_random(stage.projections, std=projection.init_method_std, seed=seed)
        return
    if projection.init == "orthogonal":
        shapes = stages[0].shapes
        basis = random_basis(shapes.teacher.hidden_size, shapes.student.hidden_size, seed=seed)
    else:
        basis = residual_basis(config, stages, calibration(), groups)
    # From one rank: a decomposition may differ between machines.
    basis = broadcast_from_first(basis.to(groups.device))
    for stage in stages:
        initialize_from_basis(stage.projections, basis, norm_gains(stage.teacher))


def residual_basis(config: Config, stages: list[PairedModel], batches: Batches, groups: Groups) -> Tensor:
    """Q [D, d], fp64: directions, or channels, of the teacher's residual stream, computed from all ranks' tokens."""
    shapes = stages[0].shapes
    moment = SecondMoment(shapes.teacher.hidden_size, groups.device)
    norms = [norm for stage in stages for norm in residual_readers(stage.teacher)]
    hooks = [norm.register_forward_pre_hook(lambda module, inputs: moment.add(inputs[0])) for norm in norms]
    try:
        forward_teacher(stages, batches, config, num_microbatches=num_micro_batches(config, groups))
    except StopIteration:
        raise ConfigError(
            f"--calibration-tokens {config.projection.calibration_tokens} is more than the training data holds. "
            "Use fewer."
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    sum_over_world(moment.total)
    if config.projection.init == "channel":
        return moment.largest_channels(shapes.student.hidden_size)
    return moment.leading_eigenvectors(shapes.student.hidden_size)


def num_micro_batches(config: Config, groups: Groups) -> int:
    """Of the calibration, on each rank: the tokens asked for, rounded up."""
    tokens_at_once = config.training.micro_batch_size * config.training.seq_length * groups.dp.size()
    return -(-config.projection.calibration_tokens // tokens_at_once)
