"""Adam's moments where what is trained changes in the middle of a run (`--open-after`)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lrc.mcore import compat
from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.mcore.stages import Trained

_STATE = ("param", "exp_avg", "exp_avg_sq")


@torch.no_grad()
def copy_state(
    before: MegatronOptimizer, old: nn.Parameter, now: MegatronOptimizer, new: nn.Parameter, replicas: ProcessGroup
) -> None:
    """A parameter's fp32 value and moments, from one optimizer to another. Collective over the replicas, since a
    DistributedOptimizer's ranks may hold other parts of it now: each puts in what it had."""
    held, wanted = compat.state_of(before, old), compat.state_of(now, new)
    if compat.is_sharded(before):
        whole = torch.zeros(len(_STATE), old.numel(), dtype=torch.float32, device=old.device)
        if held is not None:
            owned, state = held
            for row, name in zip(whole, _STATE, strict=True):
                row[owned] = state[name]
        dist.all_reduce(whole, group=replicas)
        held = slice(None), dict(zip(_STATE, whole, strict=True))
    if wanted is not None:
        assert held is not None
        owned, state = wanted
        for name in _STATE:
            state[name].copy_(held[1][name][owned])


@torch.no_grad()
def start_second_moments(
    optimizer: MegatronOptimizer,
    everything: Sequence[Trained],
    groups: Groups,
    *,
    num_updates: int,
    beta2: float,
    vocab_size: int,
) -> None:
    """Give what has no moments yet, though steps have been counted, a second moment: what it would have after
    `num_updates` steps whose squared gradients were all the mean square of this one.

    Adam corrects young moments by its count of steps, which is the run's. So a parameter that is trained from its
    middle on would be stepped too far, up to six times at betas of 0.9 and 0.999, until its second moment has grown.
    With one value for each parameter its first steps are those of gradient descent with momentum, of Adam's usual
    length, early in the run as well as late: before the first step the value is 0, as any parameter's.
    A vocabulary's rows of padding, of which there are more or fewer by layout, do not count: vocab_size are without.
    To be called with gradients ready to be stepped with. Collective over TP and data parallel ranks.
    """
    sums = torch.zeros(len(everything), 3, dtype=torch.float64, device=groups.device)  # of v, of g^2, elements
    states = [compat.state_of(optimizer, trained.parameter) for trained in everything]
    for row, held in zip(sums, states, strict=True):
        if held is not None and "grad" in held[1]:
            state = held[1]
            row += _sums(state["exp_avg_sq"], state["grad"])
    if compat.is_sharded(optimizer):
        dist.all_reduce(sums, group=groups.dp_cp)
    if groups.tp.size() > 1:
        dist.all_reduce(sums, group=groups.tp)
    grown = 1 - beta2**num_updates  # what Adam's correction divides by
    for trained, held, (present, squares, count) in zip(everything, states, sums.tolist(), strict=True):
        if trained.is_padded:
            count *= vocab_size / (trained.parameter.shape[0] * groups.tp.size())
        if held is not None and present == 0 and count:
            held[1]["exp_avg_sq"].fill_(grown * squares / count)


def _sums(second_moment: Tensor, gradient: Tensor) -> Tensor:
    count = second_moment.new_tensor(float(second_moment.numel()), dtype=torch.float64)
    norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    return torch.stack([second_moment.sum(dtype=torch.float64), norm.square(), count])
