"""The activation-clone loss of one captured linear layer, and how it is hung on the student's activation.

Algorithm 1 of arXiv 2505.12781. Its E is a mean over tokens and features; here each site's is a sum over tokens of
squared errors, averaged over the site's features. The division by the global token count comes once per step, where all
gradients are divided. Whatever this rank holds, a shard of the features or its own tokens, its value is a partial sum,
and its gradient exact without any communication.

Notation: s sequence, b micro-batch, f features of the captured output on this rank, k sites in it that are compared.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_lrc.clone.fusion import fused_on_cuda
from megatron_lrc.clone.sites import HeadLayout, Site, select


@fused_on_cuda
def squared_errors(student: Tensor, target: Tensor, sites: tuple[Site, ...], heads: HeadLayout, tp_size: int) -> Tensor:
    """[s, b, k]: each token's squared error, as `mean_squares` gives it. student, target: [s, b, f]."""
    return _mean_squares(student - target, sites, heads, tp_size)


@fused_on_cuda
def mean_squares(output: Tensor, sites: tuple[Site, ...], heads: HeadLayout, tp_size: int) -> Tensor:
    """[s, b, k], in fp32 or better: mean over a site's features of a token's squares, given its output [s, b, f].

    Of features that tensor parallelism splits, this rank's share of it: a partial sum over the tp_size ranks.
    """
    return _mean_squares(output, sites, heads, tp_size)


def _mean_squares(output: Tensor, sites: tuple[Site, ...], heads: HeadLayout, tp_size: int) -> Tensor:
    # A norm, because it is a sum of squares that needs no copy of what it squares.
    wide = torch.promote_types(output.dtype, torch.float32)
    shares = []
    for site in sites:
        part = select(site, output, heads, -1)
        norm = torch.linalg.vector_norm(part, dim=tuple(range(2, part.dim())), dtype=wide)
        shares.append(norm.square() / _width(site, part, tp_size))
    return torch.stack(shares, -1)


def _width(site: Site, part: Tensor, tp_size: int) -> int:
    """A site's features over all ranks. part: [s, b, ...], those that this rank has."""
    return part.shape[2:].numel() * (tp_size if site.split == 0 else 1)


class CloneLoss(torch.autograd.Function):
    """Gives the student's output [s, b, f] unchanged; in backward it adds the gradient of its clone losses, times
    `scale`, to the student's, and gives it to the target. So a loss need not be carried to the last pipeline stage: it
    acts where its layer lives.

    student, target: [s, b, f]; either may need a gradient (the target of o and down is the teacher's output times P).
    weight: [s, b, k], what a token's squared error counts with in the gradient; 0 for masked tokens. Features of other
    sites than these get none.
    scale: what the main loss is multiplied by before backward, times alpha.

    Nothing of the pair's size is made in forward: both are kept, and subtracted again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        target: Tensor,
        weight: Tensor,
        sites: tuple[Site, ...],
        heads: HeadLayout,
        tp_size: int,
        scale: Tensor | float,
    ) -> Tensor:
        ctx.save_for_backward(student, target, weight)
        ctx.places, ctx.scale = (sites, heads, tp_size), scale
        return student.view_as(student)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, target, weight = ctx.saved_tensors
        to_student, to_target = ctx.needs_input_grad[:2]
        weight = weight.to(torch.promote_types(student.dtype, torch.float32)) * (2.0 * ctx.scale)
        if not to_target:
            return _add_error(grads[0], student, target, weight, *ctx.places), *([None] * 6)
        error = _error(student, target, weight, *ctx.places)
        return grads[0] + error if to_student else None, error.neg_(), *([None] * 5)


@fused_on_cuda
def _add_error(
    grad: Tensor,
    student: Tensor,
    target: Tensor,
    weight: Tensor,
    sites: tuple[Site, ...],
    heads: HeadLayout,
    tp_size: int,
) -> Tensor:
    """[s, b, f]: grad + `_error`, rounded to grad's dtype once."""
    return (grad + (student - target) * _factor(student, weight, sites, heads, tp_size)).to(grad.dtype)


@fused_on_cuda
def _error(
    student: Tensor, target: Tensor, weight: Tensor, sites: tuple[Site, ...], heads: HeadLayout, tp_size: int
) -> Tensor:
    """[s, b, f]: (student - target) * weight / the width of its site, in the student's dtype."""
    return ((student - target) * _factor(student, weight, sites, heads, tp_size)).to(student.dtype)


def _factor(like: Tensor, weight: Tensor, sites: tuple[Site, ...], heads: HeadLayout, tp_size: int) -> Tensor:
    """[s, b, f], in the weight's dtype: what an error is multiplied by; 0 where no site is.

    Sites are put together here, and not in the sum: the compiler would write a sum to memory after each of them.
    """
    factor = torch.zeros_like(like, dtype=weight.dtype)
    for site, of_site in zip(sites, weight.unbind(-1), strict=True):
        part = select(site, factor, heads, -1)
        of_token = of_site / _width(site, part, tp_size)
        part.copy_(of_token.reshape(*part.shape[:2], *[1] * (part.dim() - 2)))
    return factor


class CarryLoss(torch.autograd.Function):
    """Returns an activation unchanged; in backward starts that of a `branch` beside it, whose losses are in it."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, branch: Tensor) -> Tensor:
        ctx.branch = branch.new_zeros(()).expand_as(branch)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.branch
