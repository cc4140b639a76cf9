"""The activation-clone loss of one captured linear layer, attached to the student's activation.

Algorithm 1 of arXiv 2505.12781. Its E is a mean over tokens and features, so each site contributes
sum over tokens of (squared difference / the site's global width); the division by the global token count comes once per
step, where all gradients are divided. Whatever this rank holds, a shard of the features or its own tokens, its value is
a partial sum, and its gradient exact without any communication.

Notation: s sequence, b micro-batch, f features of the captured output on this rank.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_lrc.clone.fusion import fused_on_cuda
from megatron_lrc.clone.sites import HeadLayout, Site, select


def inverse_widths(sites: list[Site], heads: HeadLayout, num_features: int, tp_size: int) -> Tensor:
    """fp64 [f]: for each feature of a captured output, 1 / (number of features of its site over all ranks)."""
    inverse = torch.zeros(num_features, dtype=torch.float64)
    for site in sites:
        part = select(site, inverse, heads)
        part.fill_(1.0 / (part.numel() * (tp_size if site.split == 0 else 1)))
    return inverse


def place_of_features(sites: list[Site], heads: HeadLayout, num_features: int) -> Tensor | None:
    """int64 [f]: for each feature of a captured output, the place of its site among `sites`; None if there is one."""
    if len(sites) == 1:
        return None
    places = torch.zeros(num_features, dtype=torch.int64)
    for place, site in enumerate(sites):
        select(site, places, heads).fill_(place)
    return places


class CloneLoss(torch.autograd.Function):
    """Masked squared error of one captured output, summed over tokens, each site's features averaged.

    Gives (student unchanged, the loss of each feature [f], for reporting and not differentiable, in fp32 or better).
    Backward adds the gradient of `scale` times the loss to the student's, and gives it to the target. The loss need not
    be carried to the last pipeline stage: it acts where its layer lives.

    student, target: [s, b, f]; either may need a gradient (the target of o and down is the teacher's output times P).
    weights: what a token's squared error counts with in the loss and in its gradient, each [s, b, k], 0 for masked
    tokens: one for each of the sites, or k = 1 for all. place: int64 [f], which of the k weighs a feature; None where
    k is 1. inverse_width: [f], 0 for features whose site is off.
    scale: what the main loss is multiplied by before backward, times alpha.

    Nothing of the pair's size is made in forward: both are kept, and subtracted again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        target: Tensor,
        weights: tuple[Tensor, Tensor],
        place: Tensor | None,
        inverse_width: Tensor,
        scale: Tensor | float,
    ) -> tuple[Tensor, Tensor]:
        in_loss, in_gradient = (weight.to(inverse_width.dtype) for weight in weights)
        per_feature = _squared_error(student, target, in_loss, place, inverse_width)
        ctx.save_for_backward(student, target, in_gradient, place, inverse_width)
        ctx.scale = scale
        ctx.mark_non_differentiable(per_feature)
        return student.view_as(student), per_feature

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        student, target, weight, place, inverse_width = ctx.saved_tensors
        factor = inverse_width * (2.0 * ctx.scale)
        if not ctx.needs_input_grad[1]:
            return _add_error(grads[0], student, target, weight, place, factor), None, None, None, None, None
        error = _error(student, target, weight, place, factor)
        return grads[0] + error if ctx.needs_input_grad[0] else None, error.neg_(), None, None, None, None


@fused_on_cuda
def _squared_error(
    student: Tensor, target: Tensor, weight: Tensor, place: Tensor | None, inverse_width: Tensor
) -> Tensor:
    """[f]: sum over tokens of weight * (student - target)^2, times inverse_width."""
    difference = (student - target).to(inverse_width.dtype).flatten(0, 1)  # [s*b, f]
    if place is None:
        return (weight.flatten() @ difference.square_()) * inverse_width
    sums = weight.flatten(0, 1).t() @ difference.square_()  # [k, f]
    return sums.gather(0, place.unsqueeze(0))[0] * inverse_width


def _of_features(weight: Tensor, place: Tensor | None) -> Tensor:
    """[s, b, f], or [s, b, 1] for all."""
    return weight if place is None else weight.index_select(-1, place)


@fused_on_cuda
def _error(student: Tensor, target: Tensor, weight: Tensor, place: Tensor | None, factor: Tensor) -> Tensor:
    """(student - target) * weight * factor, [s, b, f], in the student's dtype."""
    return (student - target).mul(_of_features(weight, place)).mul_(factor).to(student.dtype)


@fused_on_cuda
def _add_error(
    grad: Tensor, student: Tensor, target: Tensor, weight: Tensor, place: Tensor | None, factor: Tensor
) -> Tensor:
    """grad + `_error`."""
    return (grad + (student - target).mul(_of_features(weight, place)).mul_(factor)).to(student.dtype)


class CarryLoss(torch.autograd.Function):
    """Returns an activation unchanged; in backward starts that of a `branch` beside it, whose losses are in it."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, branch: Tensor) -> Tensor:
        ctx.branch = branch.new_zeros(()).expand_as(branch)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.branch
