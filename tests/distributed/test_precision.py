"""fp16: the loss scale is found, reaches every loss on every stage, and is gone from what is reported. bf16: main
parameters and gradients are fp32."""

from dataclasses import replace

import pytest

from megatron_lrc.checkpoints.saved_student import open_checkpoint
from megatron_lrc.config import Config
from runs import continued, make_config, on_layout, records, saved_in, train


@pytest.fixture
def fp32_config(tiny_llama, tiny_text, tmp_path) -> Config:
    config = make_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "fp32", steps=3)
    config.loss.kl_weight = 3.0
    return config


def in_fp16(config: Config, **settings) -> Config:
    run = str(config.checkpoint.save).replace("fp32", "fp16")
    training = replace(config.training, fp16=True, **settings)
    return replace(config, training=training, checkpoint=replace(config.checkpoint, save=run))


@pytest.mark.distributed
@pytest.mark.parametrize("ranks, layout", [(1, {}), (2, {"tp": 2}), (2, {"pp": 2})], ids=["one", "TP2+SP", "PP2"])
@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow), 1024.0])
def test_losses_and_gradient_norms_in_fp16_are_those_in_fp32(fp32_config, tmp_path, ranks, layout, scale):
    """By group: if a scale failed to reach the clone losses, q, k, v and the FFN would be off by most of it."""
    train(fp32_config)
    train(in_fp16(on_layout(fp32_config, **layout), loss_scale=scale), ranks)
    for line, reference in zip(records(tmp_path / "fp16"), records(tmp_path / "fp32"), strict=True):
        assert line["loss_scale"] == scale and "loss_scale" not in reference
        for key in ("loss", "lm_loss", "kl_loss", "clone_loss", "teacher_lm_loss", "grad_norm"):
            assert line[key] == pytest.approx(reference[key], rel=1e-2), key
        assert line["grad_norm_by_group"] == pytest.approx(reference["grad_norm_by_group"], rel=3e-2)


@pytest.mark.distributed
def test_the_search_for_the_loss_scale_does_not_stop_the_run(fp32_config, tmp_path):
    config = replace(fp32_config, training=replace(fp32_config.training, train_iters=24, max_skipped_steps=1))
    train(in_fp16(config, initial_loss_scale=2.0**24, hysteresis=1), 1)
    lines = records(tmp_path / "fp16")
    skipped = [line["skipped_steps"] for line in lines]
    found = skipped.index(0)
    assert 3 <= found <= 16 and sum(skipped[found:]) <= 2
    scales = [line["loss_scale"] for line in lines]
    assert scales[: found + 1] == [2.0**24 / 2**step for step in range(found + 1)]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[found]["lr"] == lines[0]["lr"]  # skipped steps leave the schedule where it is


@pytest.mark.distributed
def test_gradients_that_overflow_at_the_smallest_loss_scale_are_a_fault(fp32_config, tmp_path):
    impossible = in_fp16(
        fp32_config, initial_loss_scale=2.0**30, min_loss_scale=2.0**29, hysteresis=1, max_skipped_steps=2
    )
    with pytest.raises(AssertionError, match="stopped at step 3 after 2 skipped steps in a row"):
        train(impossible)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "ranks, layout",
    [
        pytest.param(2, {"pp": 2}, id="PP2", marks=pytest.mark.slow),
        pytest.param(2, {"dist_opt": True}, id="DP2-dist-opt"),
    ],
)
def test_bf16_gradients_are_those_in_fp32_and_small_updates_add_up(fp32_config, tmp_path, ranks, layout):
    """An update of 1e-4 is lost in a bf16 weight of 0.13 (steps of 1e-3), but not in its fp32 main parameter."""
    train(fp32_config)
    run = str(tmp_path / "bf16")
    optimizer = replace(fp32_config.optimizer, lr=1e-4, lr_decay_style="constant")
    training = replace(fp32_config.training, bf16=True, train_iters=0)
    config = saved_in(replace(fp32_config, training=training, optimizer=optimizer), run)
    train(on_layout(config, **layout), ranks)
    before = dict(open_checkpoint(run).projections)
    train(on_layout(continued(config, steps=20), **layout), ranks)

    line, reference = records(run)[0], records(tmp_path / "fp32")[0]
    assert line["grad_norm_by_group"] == pytest.approx(reference["grad_norm_by_group"], rel=3e-2)
    after = open_checkpoint(run).projections
    for name, matrix in before.items():
        is_coarse = matrix.abs() > 0.13  # where 1e-4 is less than half a step
        assert (after[name] != matrix)[is_coarse].float().mean() > 0.1, name


@pytest.mark.distributed
def test_deterministic_mode_changes_rounding_only_on_a_cpu(fp32_config, tmp_path):
    """megatron-core's embedding then adds up the gradients of equal tokens in another order."""
    train(fp32_config)
    run = replace(fp32_config.checkpoint, save=str(tmp_path / "deterministic"))
    train(replace(fp32_config, compute=replace(fp32_config.compute, deterministic_mode=True), checkpoint=run))
    plain, deterministic = records(tmp_path / "fp32"), records(tmp_path / "deterministic")
    for line, reference in zip(deterministic, plain, strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
