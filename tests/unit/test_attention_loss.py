"""TinyBERT's attention loss against its definition, in plain autograd."""

import pytest
import torch

from megatron_lrc.methods.tinybert.attention_loss import AttentionLoss

S, B, HEADS, GROUPS, DIM = 5, 2, 4, 2, 3


def by_definition(queries, keys, teacher_queries, teacher_keys, weight, num_heads, window=S, multiplier=DIM**-0.5):
    """Sum over queries of the mean over heads and keys met; [s, b, n, h] each."""

    def scores(query, key):
        repeated = key.repeat_interleave(HEADS // GROUPS, dim=2)
        return torch.einsum("ibnh,jbnh->bnij", query, repeated) * multiplier

    squares = (scores(queries, keys) - scores(teacher_queries, teacher_keys)).square()
    total = queries.new_zeros(())
    for query in range(S):
        met = squares[:, :, query, max(query + 1 - window, 0) : query + 1].mean(-1).sum(1) / num_heads  # [b]
        total = total + (met * weight[query]).sum()
    return total


@pytest.mark.parametrize("how", [(), (2, 0.7)], ids=["", "windows"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_value_and_gradients_are_those_of_the_definition(scale, how):
    """how: the window, and what products of queries and keys are multiplied by."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads):
        return torch.randn(S, B, heads, DIM, generator=generator, dtype=torch.float64)

    queries, keys, teacher_queries, teacher_keys = draw(HEADS), draw(GROUPS), draw(HEADS), draw(GROUPS)
    weight = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    leaves = [queries.clone().requires_grad_(), keys.clone().requires_grad_()]
    references = [queries.clone().requires_grad_(), keys.clone().requires_grad_()]
    expected = by_definition(*references, teacher_queries, teacher_keys, weight, 2 * HEADS, *how)
    same_queries, same_keys, loss = AttentionLoss.apply(
        *leaves, teacher_queries, teacher_keys, weight, 2 * HEADS, scale, *how
    )
    assert torch.equal(same_queries, queries) and torch.equal(same_keys, keys)
    torch.testing.assert_close(loss, expected)
    (scale * expected + references[0].sum() + 2 * references[1].sum()).backward()  # beside another loss
    (same_queries.sum() + 2 * same_keys.sum()).backward()
    for leaf, reference in zip(leaves, references, strict=True):
        torch.testing.assert_close(leaf.grad, reference.grad)


def test_a_student_with_the_teachers_scores_has_no_loss():
    queries, keys = torch.randn(S, B, HEADS, DIM), torch.randn(S, B, GROUPS, DIM)
    *_, loss = AttentionLoss.apply(queries, keys, queries.clone(), keys.clone(), torch.ones(S, B), HEADS, 1.0)
    assert loss == 0
