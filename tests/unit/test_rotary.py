"""RoPE: Transformer Engine's kernel turns queries and keys wherever it may; what it takes the place of is counted."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config_cases import SMOLLM2, change
from megatron_lrc.config import Config
from megatron_lrc.mcore import kernels
from megatron_lrc.mcore.compat import scale_rotation
from megatron_lrc.mcore.gpt_models import transformer_config

HALF, FULL = torch.bfloat16, torch.float32


def turn_at_once(t: Tensor, freqs: Tensor, interleaved: bool = False) -> Tensor:
    """What the kernel computes: in fp32, rounded once; features beyond those of the table pass. It refuses a table of
    angles for each sequence."""
    assert not interleaved and freqs.shape[1:3] == (1, 1) and freqs.dtype == FULL
    wide, rest = t.float().tensor_split([freqs.shape[-1]], dim=-1)
    first, second = wide.chunk(2, dim=-1)
    turned = wide * freqs.cos() + torch.cat((-second, first), dim=-1) * freqs.sin()
    return torch.cat((turned, rest), dim=-1).to(t.dtype)


@pytest.fixture
def engine(monkeypatch) -> None:
    """As if Transformer Engine and a GPU were there."""
    monkeypatch.setattr(kernels, "HAVE_TE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", turn_at_once)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ({}, HALF, True),
        ({"context_parallel_size": 2}, HALF, True),
        ({"reset_attention_mask": True}, HALF, True),
        ({"attention_backend": "local"}, HALF, True),
        ({"reset_position_ids": True}, HALF, False),
        ({"transformer_impl": "local"}, HALF, False),
        ({"bf16": False}, FULL, False),
        ({"bf16": False, "transformer_impl": "transformer_engine"}, FULL, False),
    ],
)
def test_rope_is_fused_in_both_models_unless_positions_are_reset(values: dict, dtype: torch.dtype, expected: bool):
    config = Config()
    change(config, **{"bf16": True, **values})
    both = [transformer_config(config, SMOLLM2, dtype, is_trained=is_trained) for is_trained in (False, True)]
    assert [each.apply_rope_fusion for each in both] == [expected, expected]


def test_without_a_gpu_rope_is_not_fused():
    config = Config()
    change(config, bf16=True)
    assert not transformer_config(config, SMOLLM2, HALF, is_trained=True).apply_rope_fusion


class Operations(TorchDispatchMode):
    """Counts what launches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.count += 1
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("rotated", [64, 48], ids=["whole heads", "part of a head"])
def test_megatron_core_hands_queries_and_keys_to_the_kernel(monkeypatch, rotated: int):
    """The configuration that is built leads to one call, on what the layers hold, and to the unfused result."""
    calls: list[torch.Size] = []

    def kernel(t: Tensor, freqs: Tensor, interleaved: bool) -> Tensor:
        calls.append(t.shape)
        return turn_at_once(t, freqs, interleaved)

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", kernel)
    config = Config()
    change(config, bf16=True)
    built = transformer_config(config, SMOLLM2, HALF, is_trained=True)
    query, angles = torch.randn(16, 2, 9, 64), torch.randn(16, 1, 1, rotated)
    group = type("Group", (), {"size": lambda self: 1, "rank": lambda self: 0})()
    found = rope_utils.apply_rotary_pos_emb(query.to(HALF), angles, config=built, cp_group=group)
    exact = turn_at_once(query.to(HALF).double(), angles)
    plain = rope_utils._apply_rotary_pos_emb_bshd(query.to(HALF), angles)
    assert calls == [query.shape] and torch.allclose(found, plain, atol=0.05)
    assert (found.double() - exact).norm() < (plain.double() - exact).norm()  # rounded once


@pytest.mark.usefixtures("engine")
def test_an_attention_whose_cos_and_sin_have_a_factor_is_not_fused_and_the_others_are():
    config = Config()
    change(config, bf16=True)
    built = transformer_config(config, SMOLLM2, HALF, is_trained=True)
    scaled, other = (SimpleNamespace(config=built) for _ in range(2))
    scale_rotation(scaled, 1.1386)
    assert not scaled.config.apply_rope_fusion and other.config.apply_rope_fusion


def test_what_unfused_rope_costs():
    """docs/performance.md's figures, of 2,048 tokens at the shape of LRC-1.5B: 24 heads, 8 groups of keys, 128."""
    launches = moved = least = 0
    for heads, is_trained in itertools.product((24, 8), (False, True)):
        t = torch.empty(2048, 1, heads, 128, dtype=HALF, device="meta", requires_grad=is_trained)
        gradient, angles = torch.empty_like(t), torch.empty(2048, 1, 1, 128, device="meta")
        with Operations() as operations:
            turned = rope_utils._apply_rotary_pos_emb_bshd(t, angles)
            if is_trained:
                torch.autograd.backward(turned, gradient)
        launches, moved = launches + operations.count, moved + operations.bytes
        least += (1 + is_trained) * 2 * t.numel() * t.element_size()
    assert 28 * launches == 1736 and round(28 * moved / 1e9, 1) == 19.3 and round(28 * least / 1e9, 1) == 2.8
