"""Whole runs through the training loop: the same on every layout, and after a stop the same as without one."""

from dataclasses import replace

import pytest
import torch

from megatron_lrc.checkpoints.run_directory import checkpoint_path
from megatron_lrc.checkpoints.saved_student import open_checkpoint
from megatron_lrc.config import ConfigError
from megatron_lrc.train.start_checks import check
from runs import assert_same_parameters, continued, make_config, on_layout, records, train, without_times


@pytest.mark.distributed
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "ranks, layout",
    [(2, {"tp": 2}), (2, {"pp": 2}), (2, {"cp": 2}), (2, {"dist_opt": True})],
    ids=["TP2+SP", "PP2", "CP2", "DP2"],
)
def test_one_step_gives_the_same_losses_and_projections_on_every_layout(
    tiny_llama, tiny_text, tmp_path, ranks, layout, is_tied
):
    config = make_config(tiny_llama(is_tied=is_tied), tiny_text, tmp_path / "one", steps=1)
    train(config)
    other = replace(config, checkpoint=replace(config.checkpoint, save=str(tmp_path / "other")))
    train(on_layout(other, **layout), ranks)

    for name in ("metrics.jsonl", "validation.jsonl"):
        for line, reference in zip(records(tmp_path / "other", name), records(tmp_path / "one", name), strict=True):
            for key in ("loss", "lm_loss", "kl_loss", "clone_loss"):
                assert line[key] == pytest.approx(reference[key], rel=1e-5), (name, key)
    assert records(tmp_path / "other")[0]["grad_norm"] == pytest.approx(
        records(tmp_path / "one")[0]["grad_norm"], rel=1e-4
    )
    reference, result = open_checkpoint(str(tmp_path / "one")), open_checkpoint(str(tmp_path / "other"))
    assert ("lm_head" in result.projections) != is_tied
    for name, matrix in reference.projections.items():
        assert torch.linalg.norm(result.projections[name] - matrix) <= 1e-4 * torch.linalg.norm(matrix), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    "ranks, layout, precision",
    [
        pytest.param(1, {}, "fp32", id="one"),
        pytest.param(1, {}, "bf16", id="one-bf16"),
        pytest.param(2, {"pp": 2}, "fp32", id="PP2"),
        pytest.param(2, {"tp": 2}, "bf16", id="TP2-bf16"),
        pytest.param(2, {"pp": 2}, "fp16", id="PP2-fp16"),
        pytest.param(2, {"dist_opt": True}, "fp32", id="DP2-distributed-optimizer"),
        pytest.param(2, {"dist_opt": True}, "bf16", id="DP2-distributed-optimizer-bf16"),
        pytest.param(2, {"cp": 2, "dist_opt": True}, "fp16", id="CP2-distributed-optimizer-fp16"),
    ],
)
def test_a_run_that_stopped_goes_on_bit_for_bit(tiny_llama, tiny_text, tmp_path, ranks, layout, precision):
    config = on_layout(make_config(tiny_llama(is_tied=True), tiny_text, tmp_path / "whole", steps=5), **layout)
    config.training.bf16, config.training.fp16 = precision == "bf16", precision == "fp16"
    config.training.initial_loss_scale, config.training.loss_scale_window = 2.0**8, 2  # which changes it on the way
    config.optimizer.weight_decay = 0.01
    train(config, ranks)
    stopped = replace(config, checkpoint=replace(config.checkpoint, save=str(tmp_path / "stopped")))
    train(replace(stopped, training=replace(config.training, train_iters=2)), ranks)
    train(continued(stopped, steps=5), ranks)

    assert without_times(records(tmp_path / "stopped")) == without_times(records(tmp_path / "whole"))
    assert records(tmp_path / "stopped", "validation.jsonl")[-1] == records(tmp_path / "whole", "validation.jsonl")[-1]
    assert_same_parameters(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.distributed
def test_a_run_can_go_on_from_its_untrained_state(tiny_llama, tiny_text, tmp_path):
    """Adam's state is lazy, and megatron-core saves no step count of zero: both once lost a run like this."""
    config = make_config(tiny_llama(), tiny_text, tmp_path / "whole", steps=3)
    config.optimizer.lr_decay_iters = None  # follows --train-iters: 0 first, then 3
    train(config)
    stopped = replace(config, checkpoint=replace(config.checkpoint, save=str(tmp_path / "stopped")))
    train(replace(stopped, training=replace(config.training, train_iters=0)))
    assert records(tmp_path / "stopped", "validation.jsonl")[0] == records(tmp_path / "whole", "validation.jsonl")[0]
    copied = replace(
        config, checkpoint=replace(config.checkpoint, save=str(tmp_path / "copy"), load=str(tmp_path / "stopped"))
    )
    train(replace(copied, training=replace(config.training, train_iters=0)))
    assert_same_parameters(tmp_path / "copy", tmp_path / "stopped")
    train(continued(stopped, steps=3))
    assert without_times(records(tmp_path / "stopped")) == without_times(records(tmp_path / "whole"))


@pytest.mark.distributed
@pytest.mark.parametrize("dist_opt", [False, True], ids=["replicated", "distributed-optimizer"])
def test_a_continued_run_takes_its_learning_rate_from_the_flags(tiny_llama, tiny_text, tmp_path, dist_opt):
    config = on_layout(make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=1), dist_opt=dist_opt)
    train(config)
    train(continued(replace(config, optimizer=replace(config.optimizer, lr=5e-4, lr_decay_iters=10)), steps=3))
    assert [line["lr"] for line in records(tmp_path / "run")] == pytest.approx([1e-3, 5e-4 * 0.9, 5e-4 * 0.8])


@pytest.mark.distributed
@pytest.mark.parametrize("dist_opt", [False, True], ids=["replicated", "distributed-optimizer"])
def test_a_checkpoint_loads_on_another_layout(tiny_llama, tiny_text, tmp_path, dist_opt):
    """Parameters, Adam's moments and step count all carry over: the next steps are those of the uninterrupted run."""
    config = on_layout(make_config(tiny_llama(is_tied=True), tiny_text, tmp_path / "whole", steps=5), dist_opt=dist_opt)
    train(config)
    moved = replace(config, checkpoint=replace(config.checkpoint, save=str(tmp_path / "moved")))
    train(on_layout(replace(moved, training=replace(config.training, train_iters=2)), tp=2, dist_opt=dist_opt), 2)
    train(on_layout(continued(moved, steps=4), pp=2, dist_opt=dist_opt), 2)
    train(on_layout(continued(moved, steps=5), dist_opt=dist_opt))
    for line, reference in zip(records(tmp_path / "moved"), records(tmp_path / "whole"), strict=True):
        for key in ("loss", "lm_loss", "kl_loss", "clone_loss"):
            assert line[key] == pytest.approx(reference[key], rel=1e-4), (line["step"], key)


@pytest.mark.distributed
def test_training_lowers_the_held_out_losses(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=40)
    config.optimizer.lr, config.optimizer.lr_decay_iters = 6e-3, None
    config.logging.log_interval = 20
    train(config)
    before, after = records(tmp_path / "run", "validation.jsonl")
    for key in ("loss", "lm_loss", "clone_loss"):
        assert after[key] < 0.9 * before[key], key
    assert [line["step"] for line in records(tmp_path / "run")] == [20, 40]
    assert [line["tokens"] for line in records(tmp_path / "run")] == [20 * 8 * 16, 40 * 8 * 16]


@pytest.mark.distributed
def test_accumulating_micro_batches_changes_nothing(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, tmp_path / "two", steps=2)
    train(config)
    whole = replace(config, checkpoint=replace(config.checkpoint, save=str(tmp_path / "eight")))
    train(replace(whole, training=replace(config.training, micro_batch_size=8)))
    for line, reference in zip(records(tmp_path / "eight"), records(tmp_path / "two"), strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-5)


@pytest.mark.distributed
def test_a_run_is_never_written_over_or_continued_with_another_student(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=1)
    train(config)
    assert checkpoint_path(str(tmp_path / "run"), 1).is_dir()

    with pytest.raises(ConfigError, match="already holds checkpoints"):
        check(config, 1)
    inside_a_file = tmp_path / "run" / "metrics.jsonl" / "new"
    with pytest.raises(ConfigError, match="metrics.jsonl is a file"):
        check(replace(config, checkpoint=replace(config.checkpoint, save=str(inside_a_file))), 1)
    wider = replace(continued(config, steps=2), model=replace(config.model, student_hidden_size=32))
    with pytest.raises(ConfigError, match="hidden size 24.*ask for 32"):
        check(wider, 1)
    other = replace(continued(config, steps=2), model=replace(config.model, teacher=tiny_llama(dtype=torch.float64)))
    with pytest.raises(ConfigError, match="not the teacher"):
        check(other, 1)
    with pytest.raises(ConfigError, match="past --train-iters 0"):
        check(continued(config, steps=0), 1)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "dist_opt",
    [pytest.param(False, id="replicated", marks=pytest.mark.slow), pytest.param(True, id="distributed-optimizer")],
)
def test_an_interleaved_run_is_that_of_one_rank_and_its_checkpoint_loads_anywhere(
    tiny_llama, tiny_text, tmp_path, dist_opt
):
    teacher = tiny_llama(is_tied=True, num_layers=4)
    config = on_layout(make_config(teacher, tiny_text, tmp_path / "whole", steps=4), dist_opt=dist_opt)
    train(config)
    moved = replace(config, checkpoint=replace(config.checkpoint, save=str(tmp_path / "moved")))
    interleaved = {"pp": 2, "chunks": 2, "dist_opt": dist_opt}
    train(on_layout(replace(moved, training=replace(config.training, train_iters=1)), **interleaved), 2)
    train(on_layout(continued(moved, steps=3), **interleaved), 2)
    train(on_layout(continued(moved, steps=4), dist_opt=dist_opt))
    for line, reference in zip(records(tmp_path / "moved"), records(tmp_path / "whole"), strict=True):
        for key in ("loss", "lm_loss", "kl_loss", "clone_loss", "grad_norm"):
            assert line[key] == pytest.approx(reference[key], rel=1e-4), (line["step"], key)
