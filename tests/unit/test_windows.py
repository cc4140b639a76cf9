"""Sliding windows: which keys a query meets, in pieces of a sequence and in documents, and what they cost."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from config_cases import SMOLLM2
from megatron_lrc.estimate.flops import keys_met, layer_flops, layers_flops
from megatron_lrc.mcore import attention
from megatron_lrc.mcore.attention import ScaledDotProductAttention

S, B, HEADS, GROUPS, DIM = 23, 2, 4, 2, 3


def core(window: int | None) -> ScaledDotProductAttention:
    """Of one process that needs no groups."""
    built = ScaledDotProductAttention.__new__(ScaledDotProductAttention)
    torch.nn.Module.__init__(built)
    built.softmax_scale, built.window = None, window
    return built


def by_definition(query, key, value, window):
    """Queries are the last of the keys' tokens; each meets the last `window` keys up to its own."""
    places = torch.arange(len(key))
    distance = places[len(key) - len(query) :, None] - places
    mask = (distance >= 0) & (distance < window)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("rows", [512, 3])
@pytest.mark.parametrize("queries", [S, 9, 1])
@pytest.mark.parametrize("window", [1, 5, S - 1, S, 4096])
def test_a_query_meets_the_keys_of_its_window(monkeypatch, window: int, queries: int, rows: int) -> None:
    monkeypatch.setattr(attention, "_WINDOW_ROWS", rows)
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(S, B, heads, DIM, generator=generator).double() for heads in (HEADS, GROUPS, GROUPS)]
    query, key, value = whole[0][S - queries :].requires_grad_(), *(x.requires_grad_() for x in whole[1:])
    found, expected = core(window)._attend(query, key, value), by_definition(query, key, value, window)
    assert torch.allclose(found, expected, atol=1e-13)
    weight = torch.randn(expected.shape, generator=generator).double()
    for one, other in zip(
        *(torch.autograd.grad((x * weight).sum(), (query, key, value)) for x in (found, expected)), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-13)


@pytest.mark.parametrize("window", [None, 1, 5, S, 99])
def test_the_estimate_counts_the_keys_that_are_met(window: int | None) -> None:
    met = sum(min(place + 1, window or S) for place in range(S)) / S
    assert keys_met(S, window) == pytest.approx(met, abs=1e-12)
    shape = replace(SMOLLM2, sliding_window=window or 0, windowed_layers=(3, 7) if window else ())
    expected = 28 * layer_flops(shape, (S + 1) / 2) + 2 * layer_flops(shape, met)
    assert layers_flops(shape, S) == pytest.approx(expected, rel=1e-12)
