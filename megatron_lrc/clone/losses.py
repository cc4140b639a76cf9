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

from megatron_lrc.clone.sites import HeadLayout, Site, select


def inverse_widths(sites: list[Site], heads: HeadLayout, num_features: int, tp_size: int) -> Tensor:
    """fp64 [f]: for each feature of a captured output, 1 / (number of features of its site over all ranks)."""
    inverse = torch.zeros(num_features, dtype=torch.float64)
    for site in sites:
        part = select(site, inverse, heads)
        part.fill_(1.0 / (part.numel() * (tp_size if site.split == 0 else 1)))
    return inverse


class CloneLoss(torch.autograd.Function):
    """Masked squared error of one captured output, summed over tokens, each site's features averaged.

    Gives (loss, the same for each feature [f], for reporting and not differentiable), in fp32 or better.

    student, target: [s, b, f]; either may need a gradient (the target of o and down is the teacher's output times P).
    token_weight: [s, b], 0 for masked tokens. inverse_width: [f], 0 for features whose site is off.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, target: Tensor, token_weight: Tensor, inverse_width: Tensor
    ) -> tuple[Tensor, Tensor]:
        difference = student - target
        wide = difference.to(torch.promote_types(difference.dtype, torch.float32)).flatten(0, 1)  # [s*b, f]
        weight = token_weight.to(wide.dtype)
        per_feature = (weight.flatten() @ wide.square()) * inverse_width  # [f]
        ctx.save_for_backward(difference, weight, inverse_width)
        ctx.mark_non_differentiable(per_feature)
        return per_feature.sum(), per_feature

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        difference, weight, inverse_width = ctx.saved_tensors
        factor = weight.unsqueeze(-1) * (2.0 * grads[0] * inverse_width)  # [s, b, f]
        grad = (difference * factor).to(difference.dtype)
        return grad if ctx.needs_input_grad[0] else None, -grad if ctx.needs_input_grad[1] else None, None, None


class AttachLoss(torch.autograd.Function):
    """Returns an activation unchanged, and in backward starts the gradient of `scale` times a scalar loss.

    The loss need not be carried to the last pipeline stage: it acts where its layer lives. scale: what the main loss is
    multiplied by before backward, times alpha.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor, scale: Tensor | float) -> Tensor:
        ctx.loss_grad = loss.new_ones(()) * scale
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.loss_grad, None
