"""TinyBERT's loss on attention scores, attached to the student's queries and keys.

arXiv 1909.10351, equation 7: the mean squared difference of the scores before their softmax, here over heads and over
the keys that a causal query meets. As in `losses.py` the value is a sum over tokens (queries), and what a rank holds, a
shard of the heads, makes a partial sum.

Notation: s sequence, b micro-batch, n query heads and g KV groups of this rank, h head_dim.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class AttentionLoss(torch.autograd.Function):
    """Gives (queries unchanged, keys unchanged, the loss [], for reporting and not differentiable).

    queries [s, b, n, h], keys [s, b, g, h]: the student's, then the teacher's. token_weight: [s, b], 0 for masked
    queries. num_heads: over all ranks. scale: what the main loss is multiplied by before backward, times its weight.
    window: how many keys a query meets at most, itself among them; None: all before it. multiplier: of the products of
    queries and keys; None: 1 / sqrt(head_dim).

    Scores exist for one head at a time, and are computed again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        teacher_queries: Tensor,
        teacher_keys: Tensor,
        token_weight: Tensor,
        num_heads: int,
        scale: Tensor | float,
        window: int | None = None,
        multiplier: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        multiplier = queries.shape[-1] ** -0.5 if multiplier is None else multiplier
        weight = _weight_of_pairs(token_weight, num_heads, torch.promote_types(queries.dtype, torch.float32), window)
        loss = weight.new_zeros(())
        for head, group in _heads(queries, keys):
            difference = _difference(queries, keys, teacher_queries, teacher_keys, head, group).mul_(multiplier)
            loss += (difference.square_() * weight).sum()
        ctx.save_for_backward(queries, keys, teacher_queries, teacher_keys, weight)
        ctx.scale, ctx.multiplier = scale, multiplier
        ctx.mark_non_differentiable(loss)
        return queries.view_as(queries), keys.view_as(keys), loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, teacher_queries, teacher_keys, weight = ctx.saved_tensors
        to_queries, to_keys = grads[0].clone(), grads[1].clone()
        factor = weight * (2.0 * ctx.scale * ctx.multiplier**2)
        for head, group in _heads(queries, keys):
            error = _difference(queries, keys, teacher_queries, teacher_keys, head, group).mul_(factor)  # [b, s, s]
            error = error.to(queries.dtype)
            to_queries[:, :, head] += (error @ keys[:, :, group].transpose(0, 1)).transpose(0, 1)
            to_keys[:, :, group] += (error.transpose(1, 2) @ queries[:, :, head].transpose(0, 1)).transpose(0, 1)
        return to_queries, to_keys, *[None] * 7


def _heads(queries: Tensor, keys: Tensor) -> Iterator[tuple[int, int]]:
    """(query head, its KV group)."""
    per_group = queries.shape[2] // keys.shape[2]
    return ((head, head // per_group) for head in range(queries.shape[2]))


def _weight_of_pairs(token_weight: Tensor, num_heads: int, dtype: torch.dtype, window: int | None) -> Tensor:
    """[b, s queries, s keys]: a query's weight over the heads and the keys that it meets; 0 for the others."""
    length = len(token_weight)
    met = torch.ones(length, length, dtype=dtype, device=token_weight.device).tril_()
    if window is not None:
        met.triu_(1 - window)
    return token_weight.t().to(dtype).unsqueeze(-1) * (met / (met.sum(-1, keepdim=True) * num_heads))


def _difference(
    queries: Tensor, keys: Tensor, teacher_queries: Tensor, teacher_keys: Tensor, head: int, group: int
) -> Tensor:
    """[b, s, s]: products of the student's queries and keys of a head, less the teacher's; in fp32 or better."""

    def products(query: Tensor, key: Tensor) -> Tensor:
        product = query[:, :, head].transpose(0, 1) @ key[:, :, group].permute(1, 2, 0)
        return product.to(torch.promote_types(product.dtype, torch.float32))

    return products(queries, keys) - products(teacher_queries, teacher_keys)
