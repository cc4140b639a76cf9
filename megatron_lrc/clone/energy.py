"""The energy of the teacher's outputs: what --clone-normalization token divides a token's squared error by.

A teacher has massive activations: a few tokens, mostly first ones, whose FFN outputs are a thousand times the others'.
A mean of squared errors is then theirs, and its gradient tears at what the other tokens have learnt. So each token's
error is taken relative to its own target's mean square (its energy), and not below the energy that is typical of the
site, or tokens whose targets are nearly zero would take over instead.

Both come from the teacher alone and are constants to autograd. A scale that moved with P could be lowered by
shrinking P, since the targets o_T P are not detached.

Notation: s sequence, b micro-batch, f features of a captured output on this rank, k sites in it.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lrc.clone.sites import HeadLayout, Site, select

#: Below this a site's typical energy is none: there is nothing to compare with, and no loss.
_NOTHING = 1e-20


def energies(target: Tensor, sites: list[Site], heads: HeadLayout, tp: ProcessGroup) -> Tensor:
    """[s, b, k], in fp32 or better: mean over a site's features of the teacher's squared output [s, b, f].

    Features that tensor parallelism splits are summed over its ranks: a collective of them.
    """
    wide = torch.promote_types(target.dtype, torch.float32)
    parts = [select(site, target, heads, -1).to(wide).square().flatten(2).mean(-1) for site in sites]
    found = torch.stack(parts, dim=-1)
    if sites[0].split == 0 and tp.size() > 1:
        dist.all_reduce(found, group=tp)
        found /= tp.size()
    return found


def relative_weight(token_weight: Tensor, energy: Tensor, typical: Tensor) -> Tensor:
    """[s, b, k]: token_weight [s, b] divided by each token's energy [s, b, k], or by the site's typical one [k] where
    that is larger."""
    weight = token_weight.unsqueeze(-1) / energy.maximum(typical.to(energy)).clamp_min(_NOTHING)
    return weight.where(typical > _NOTHING, 0.0)


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
