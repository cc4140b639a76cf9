"""Hard concrete masks have their expectations and derivatives, and the Lagrangian brings them to their sizes."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_lrc.config import Config, ModelShape
from megatron_lrc.methods.sheared.hard_concrete import likely, probability_kept, sample
from megatron_lrc.methods.sheared.masks import Mask, Masks, masks_between


def make(masks: list[Mask], *, pruning_steps: int = 100, seed: int = 3, lr: float = 1.0) -> Masks:
    config = Config()
    config.training.seed, config.pruning.prune_after, config.pruning.mask_lr = seed, pruning_steps, lr
    config.optimizer.adam_beta1, config.optimizer.adam_beta2, config.optimizer.adam_eps = 0.9, 0.999, 1e-8
    return Masks(masks, config, torch.device("cpu"))


@pytest.mark.parametrize("log_alpha", [-3.0, -0.5, 0.0, 2.0])
def test_a_sample_is_kept_as_often_as_expected(log_alpha):
    uniform = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameter = torch.full_like(uniform, log_alpha)
    z, _ = sample(parameter, uniform)
    assert 0 <= z.min() <= z.max() <= 1
    expected, _ = probability_kept(torch.tensor(log_alpha))
    assert (z > 0).double().mean().item() == pytest.approx(expected.item(), abs=0.004)
    if log_alpha == 0:  # symmetric
        assert z.mean().item() == pytest.approx(0.5, abs=0.004)
        assert (z == 0).double().mean().item() == pytest.approx((z == 1).double().mean().item(), abs=0.004)


def test_derivatives_are_those_of_autograd():
    generator = torch.Generator().manual_seed(2)
    log_alpha = torch.randn(500, dtype=torch.float64, generator=generator).mul_(2).requires_grad_()
    uniform = torch.rand(500, dtype=torch.float64, generator=generator)
    for function in (lambda x: sample(x, uniform), probability_kept):
        value, slope = function(log_alpha)
        (expected,) = torch.autograd.grad(value.sum(), log_alpha)
        torch.testing.assert_close(slope.detach(), expected)
    assert likely(torch.tensor([-9.0, 0.0, 9.0])).tolist() == [0.0, 0.5, 1.0]


def test_there_is_a_mask_for_what_shrinks():
    shape = ModelShape(
        num_layers=2,
        hidden_size=48,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=8,
        ffn_hidden_size=80,
        vocab_size=99,
        norm_epsilon=1e-5,
        is_tied=True,
    )
    assert masks_between(shape, replace(shape, hidden_size=24)) == [Mask("hidden", 48, 24)]
    narrower = masks_between(shape, replace(shape, num_query_groups=2, ffn_hidden_size=60))
    assert narrower[:2] == [Mask("layers.0.groups", 4, 2), Mask("layers.0.neurons", 80, 60)] and len(narrower) == 4


def test_what_a_step_draws_follows_from_seed_step_and_name():
    both = [Mask("hidden", 6, 3), Mask("layers.1.neurons", 6, 3)]
    first, alone = make(both).sampled(), make(both[1:]).sampled()
    assert torch.equal(first[both[1].name], alone[both[1].name])
    assert not torch.equal(first["hidden"], first[both[1].name])
    assert not torch.equal(make(both, seed=4).sampled()["hidden"], first["hidden"])
    later = make(both)
    later.step(torch.zeros(12, dtype=torch.float64))
    assert not torch.equal(later.sampled()["hidden"], first["hidden"])


@pytest.mark.parametrize("target, lr", [(24, 1.0), (40, 1.0), (24, 0.1)])
def test_the_lagrangian_brings_the_expected_size_to_the_target_and_the_loss_says_which_units(target, lr):
    """A loss that would keep everything, some units more than others. With the paper's rate of 1 that counts for
    little in so few steps."""
    masks = make([Mask("hidden", 48, target)], pruning_steps=400, lr=lr)
    worth = torch.linspace(0.1, 1.0, 48, dtype=torch.float64) * 1e-3
    worth = worth[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    sizes = []
    for step in range(400):
        if step == 40:
            assert masks.targets()["hidden"] == pytest.approx(48 - (48 - target) / 2)  # half of the fifth
        masks.gradient.zero_()
        masks.sampled()
        masks.add_gradient("hidden", -worth)
        masks.step(masks.gradient)
        sizes.append(masks.expected_sizes()["hidden"].item())
    assert sum(sizes[-50:]) / 50 == pytest.approx(target, abs=1)
    assert masks.log_alpha.abs().max() <= math.log(100)
    kept = set(masks.kept()["hidden"].tolist())
    assert len(kept) == target
    best = set(worth.sort(descending=True).indices[:target].tolist())
    assert lr == 1 or len(kept & best) >= 0.7 * target
