"""THE TABLE of what masks act on: for each kind of tensor, which of its dimensions are hidden dimensions, KV groups or
FFN neurons, and whether the masks are multiplied into it.

The masks are multiplied into what writes to the residual stream: that is zero where a hidden dimension is masked, and
what reads it needs nothing. A KV group and a neuron are masked where their outputs are read, in o and down. RMSNorm
averages over all D dimensions, of which k are not zero: its gain times sqrt(k / D) is that of the narrower model,
whose mean is over k (epsilon aside). Pruning, all of the table's dimensions shrink to the units that are kept.

A tensor is looked at by `view`: q, k, v and their biases [groups, features, ...], o [hidden, groups, features]; the
others as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lrc.checkpoints.layout import SITES
from megatron_lrc.clone.sites import HeadLayout, select
from megatron_lrc.methods.sheared.masks import GROUPS, HIDDEN, NEURONS, mask_name


@dataclass(frozen=True, slots=True)
class Axes:
    """kinds: of each dimension; None where nothing is masked. is_masked: whether masks are multiplied into it."""

    kinds: tuple[str | None, ...]
    is_masked: bool = False


AXES: dict[str, Axes] = {
    "embed": Axes((None, HIDDEN), is_masked=True),
    **{name: Axes((GROUPS, None, HIDDEN)) for name in "qkv"},
    **{f"{name}_bias": Axes((GROUPS, None)) for name in "qkv"},
    "o": Axes((HIDDEN, GROUPS, None), is_masked=True),
    "gate": Axes((NEURONS, HIDDEN)),
    "up": Axes((NEURONS, HIDDEN)),
    "down": Axes((HIDDEN, NEURONS), is_masked=True),
    "lm_head": Axes((None, HIDDEN)),
    "norm": Axes((HIDDEN,)),
    "head_norm": Axes((None,)),  # of q and k
}


def view(name: str, tensor: Tensor, heads: HeadLayout) -> Tensor:
    """The part of a, maybe fused, parameter that this row of the table speaks of, with its dimensions."""
    if name == "o":
        return tensor.unflatten(1, (-1, heads.queries_per_group * heads.head_dim))
    site = SITES.get(name.removesuffix("_bias"))
    return tensor if site is None else select(site, tensor, heads)


def masks_of(name: str, layer: int | None, z: Mapping[str, Tensor]) -> list[Tensor | None]:
    """The mask of each dimension, of those that there are."""
    return [None if kind is None else z.get(mask_name(kind, layer)) for kind in AXES[name].kinds]


def masked(tensor: Tensor, masks: list[Tensor | None]) -> Tensor:
    """[...] times a mask along each dimension that has one; at least fp32."""
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    for dim, mask in enumerate(masks):
        if mask is not None:
            tensor = tensor * mask.to(tensor.dtype).view([-1 if dim == i else 1 for i in range(tensor.dim())])
    return tensor


def mask_gradients(gradient: Tensor, tensor: Tensor, masks: list[Tensor | None]) -> dict[int, Tensor]:
    """Dimension -> gradient [units] by its mask, from that by `masked(tensor, masks)`."""
    product = gradient * tensor
    found = {}
    for dim, mask in enumerate(masks):
        if mask is not None:
            others = [None if dim == i else other for i, other in enumerate(masks)]
            rest = [i for i in range(product.dim()) if i != dim]
            found[dim] = masked(product, others).sum(rest)
    return found


def gain_factor(z: Tensor) -> Tensor:
    """What a norm's gain is multiplied by, from the mask [D] of the hidden dimensions: sqrt(k / D), a scalar."""
    return (torch.count_nonzero(z).clamp_min(1).double() / len(z)).sqrt()
