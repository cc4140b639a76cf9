"""Which KV groups and FFN neurons of a teacher's layer a slimmer student's layer keeps, and where they are put.

A kept group has its rows in q, k and v (weights, biases and wide norms) and its columns in o; a kept neuron a row in
gate and up and a column in down. What a layer computes does not depend on the order of its groups and neurons, if all
of these follow. So a teacher is read in an order of ours: each tensor parallel rank has an equal share of the kept ones
first, in rising order, and an equal share of the others after them. The student's matrices are then made of the first
rows or columns of the teacher's on the same rank, which are a view (`sites.kept_part`), and no rank needs another's.

The choice itself knows nothing of a layout: it is stored in the teacher's own order.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_lrc.clone.sites import HeadLayout

Unit = Literal["groups", "neurons"]
UNITS: tuple[Unit, ...] = get_args(Unit)

#: What a tensor's rows (of o and down its columns) belong to.
UNIT_OF: dict[str, Unit] = {
    **dict.fromkeys(("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "q_wide_norm", "k_wide_norm"), "groups"),
    **dict.fromkeys(("gate", "up", "down"), "neurons"),
}


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Of one layer of a teacher: int64, rising, counted from 0 over all tensor parallel ranks."""

    groups: Tensor
    neurons: Tensor

    def of(self, unit: Unit) -> Tensor:
        return self.groups if unit == "groups" else self.neurons

    def features(self, name: str, heads: HeadLayout) -> Tensor:
        """Which rows of the teacher's tensor of this name, whole and in Hugging Face's order, the student keeps; of o
        and down, which columns."""
        return _features(name, self.of(UNIT_OF[name]), heads)

    def first_on_rank(self, name: str, heads: HeadLayout, total: int, rank: int, size: int) -> Tensor:
        """The same of all that a tensor parallel rank has of the teacher: its share of the kept ones first. total: of
        the teacher's groups or neurons."""
        kept = self.of(UNIT_OF[name])
        is_dropped = torch.ones(total, dtype=torch.bool)
        is_dropped[kept] = False
        others = is_dropped.nonzero().squeeze(1)
        return _features(name, torch.cat([units.chunk(size)[rank] for units in (kept, others) if len(units)]), heads)

    def kept_on_rank(self, name: str, heads: HeadLayout, rank: int, size: int) -> Tensor:
        """What the student has of it on this rank."""
        return _features(name, self.of(UNIT_OF[name]).chunk(size)[rank], heads)


def _features(name: str, units: Tensor, heads: HeadLayout) -> Tensor:
    """Rows or columns of these groups or neurons, one after the other."""
    width = 1
    if UNIT_OF[name] == "groups":
        width = heads.head_dim * (heads.queries_per_group if name.startswith(("q", "o")) else 1)
    return (units.unsqueeze(1) * width + torch.arange(width)).flatten()
