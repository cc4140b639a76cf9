"""--clone-normalization token: a token's squared error relative to the teacher's energy, and bounded in its pull.

A teacher has massive activations: a few tokens, mostly first ones, whose FFN outputs are a thousand times the others'.
A mean of squared errors is then theirs, and its gradient tears at what the other tokens have learnt. So each token's
error is taken relative to its own target's mean square (its energy), and not below the energy that is typical of the
site, or tokens whose targets are nearly zero would take over instead.

Both come from the teacher alone and are constants to autograd. A scale that moved with P could be lowered by
shrinking P, since the targets o_T P are not detached.

A student makes massive activations too, and at first on other tokens than the teacher: one such token's relative error
is hundreds of times the sum of all others'. So the relative error r of a token counts as Huber's loss: as it is up to
1, where nothing of the target is met, and from there on as 2 sqrt(r) - 1, whose gradient no longer grows.

Notation: s sequence, b micro-batch, f features of a captured output on this rank, k sites in it.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lrc.clone.sites import Site

#: Below this a site's typical energy is none: there is nothing to compare with, and no loss.
_NOTHING = 1e-20


def summed_over_tp(partial: Tensor, sites: tuple[Site, ...], tp: ProcessGroup) -> Tensor:
    """In place: `mean_squares` [..., s, b, k] of whole sites. A collective of the TP ranks where they split features,
    one for all that is stacked."""
    if sites[0].split == 0 and tp.size() > 1:
        dist.all_reduce(partial, group=tp)
    return partial


def relative_weights(token_weight: Tensor, error: Tensor, energy: Tensor, typical: Tensor) -> tuple[Tensor, Tensor]:
    """What the squared errors of a token count with in the loss, and in its gradient, each [s, b, k].

    token_weight: [s, b]. error: [s, b, k], mean over a site's features of the squared error. energy: [s, b, k].
    typical: [k], of the site, which replaces a token's energy where it is larger.
    """
    scale = energy.maximum(typical.to(energy)).clamp_min(_NOTHING)
    bound = (error / scale).clamp_min(1).sqrt()  # 1 below Huber's threshold
    in_gradient = (token_weight.unsqueeze(-1) / (scale * bound)).where(typical > _NOTHING, 0.0)
    return in_gradient * (2 - 1 / bound), in_gradient


class TypicalEnergy:
    """The geometric mean over tokens of a layer's energies, site by site: that of most tokens, whatever a few do.

    total: fp64 [2, k], sums over tokens of log energies and of tokens: partial over whatever ranks see.
    """

    def __init__(self, num_sites: int, device: torch.device):
        self.total = torch.zeros(2, num_sites, dtype=torch.float64, device=device)

    def add(self, places: Tensor, energy: Tensor, token_weight: Tensor) -> None:
        """energy: [s, b, k] of the sites at these `places`; token_weight: [s, b]."""
        weight = token_weight.unsqueeze(-1).double()
        self.total[0, places] += (energy.double().clamp_min(1e-30).log() * weight).sum((0, 1))
        self.total[1, places] += weight.sum()

    def result(self) -> Tensor:
        """fp64 [k]; zero where no token was seen."""
        logs, count = self.total
        return torch.where(count > 0, (logs / count.clamp_min(1)).exp(), 0.0)
