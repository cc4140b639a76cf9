"""--method sheared in whole runs: the same on every layout, after a stop as without one, cut, trained on, exported."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from config_cases import change
from megatron_lrc.checkpoints.run_directory import checkpoint_path
from megatron_lrc.checkpoints.saved_student import open_checkpoint
from megatron_lrc.config import ConfigError, validate
from megatron_lrc.estimate.stage import parameter_count
from megatron_lrc.methods import method_of
from megatron_lrc.train.dry_run import dry_run
from megatron_lrc.train.start_checks import check
from method_runs import CUT, sheared_config
from runs import (
    assert_close_weights,
    assert_same_weights,
    continued,
    for_steps,
    on_layout,
    records,
    saved_in,
    train,
    without_times,
)
from tools_path import convert_to_hf, tool_main

pytestmark = pytest.mark.distributed

verify_model = tool_main("verify_model")


@pytest.mark.parametrize(
    "ranks, layout",
    [
        pytest.param(2, {"pp": 2}, id="PP2", marks=pytest.mark.slow),
        pytest.param(2, {}, id="DP2", marks=pytest.mark.slow),
        pytest.param(2, {"dist_opt": True}, id="DP2-distributed-optimizer"),
        pytest.param(2, {"tp": 2}, id="TP2+SP"),
        pytest.param(2, {"cp": 2}, id="CP2", marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2, "pp": 2, "chunks": 2}, id="TP2+SPxPP2x2", marks=pytest.mark.slow),
    ],
)
def test_runs_are_the_same_on_every_layout(tied_qwen, tiny_text, tmp_path, ranks, layout):
    groups = None if "tp" in layout else 1
    config = sheared_config(tied_qwen, tiny_text, tmp_path / "one", groups=groups)
    train(config)
    train(on_layout(saved_in(config, tmp_path / "other"), **layout), ranks)
    for name in ("metrics.jsonl", "validation.jsonl"):
        for line, reference in zip(records(tmp_path / "other", name), records(tmp_path / "one", name), strict=True):
            assert line["loss"] == line["lm_loss"] == pytest.approx(reference["loss"], rel=1e-4)
    for line, reference in zip(records(tmp_path / "other"), records(tmp_path / "one"), strict=True):
        assert line["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3)
        assert ("mask_sizes" in line) == (line["step"] <= CUT)
        assert line.get("mask_sizes") == (reference.get("mask_sizes") and pytest.approx(reference["mask_sizes"]))
    assert_close_weights(tmp_path / "one", tmp_path / "other", within=1e-3)


@pytest.mark.parametrize(
    "ranks, layout, precision",
    [
        pytest.param(1, {}, "fp32", id="one"),
        pytest.param(2, {"pp": 2}, "fp16", id="PP2-fp16", marks=pytest.mark.slow),
        pytest.param(2, {"dist_opt": True}, "bf16", id="DP2-distributed-optimizer-bf16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("stop", [CUT, *[pytest.param(stop, marks=pytest.mark.slow) for stop in (CUT - 1, CUT + 1)]])
def test_a_stop_before_at_or_after_the_cut_changes_nothing(
    tied_qwen, tiny_text, tmp_path, stop, ranks, layout, precision
):
    config = on_layout(sheared_config(tied_qwen, tiny_text, tmp_path / "whole"), **layout)
    if precision != "fp32":
        config.training = replace(config.training, **{precision: True})
        config.training.initial_loss_scale = 2.0**8
    train(config, ranks)
    stopped = saved_in(config, tmp_path / "stopped", async_save=True)
    train(for_steps(stopped, stop), ranks)
    saved = open_checkpoint(str(tmp_path / "stopped"))
    assert (saved.state.changed_at, saved.shape.hidden_size) == ((None, 48) if stop <= CUT else (CUT, 28))
    train(continued(stopped, steps=4), ranks)
    assert without_times(records(tmp_path / "stopped")) == without_times(records(tmp_path / "whole"))
    assert records(tmp_path / "stopped", "validation.jsonl")[-1] == records(tmp_path / "whole", "validation.jsonl")[-1]
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")


def test_a_checkpoint_loads_on_another_layout(tied_qwen, tiny_text, tmp_path):
    """Saved every step, so that what is planned changes between two saves."""
    config = sheared_config(tied_qwen, tiny_text, tmp_path / "whole")
    train(config)
    moved = saved_in(config, tmp_path / "moved", save_interval=1)
    train(on_layout(for_steps(moved, 1), pp=2), 2)
    train(on_layout(continued(moved, steps=3), dist_opt=True), 2)
    train(continued(moved, steps=4))
    for line, reference in zip(records(tmp_path / "moved"), records(tmp_path / "whole"), strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-4)


@pytest.mark.parametrize("groups, neurons", [(1, 50), (None, None)], ids=["all-widths", "hidden"])
def test_the_cut_model_is_exported_and_verified(tied_qwen, tiny_text, tmp_path, capsys, groups, neurons):
    run, output = tmp_path / "run", tmp_path / "exported"
    config = sheared_config(tied_qwen, tiny_text, run, groups=groups, neurons=neurons)
    config.checkpoint.save_interval = 1
    train(config)
    before = str(checkpoint_path(run, CUT))
    assert convert_to_hf(["--load", before, "--output", str(output)]) == 2
    assert f"cuts its model in the step after step {CUT} (--prune-after {CUT})" in capsys.readouterr().err
    assert convert_to_hf(["--load", str(run), "--output", str(output)]) == 0
    assert verify_model([str(run), str(output)]) == 0
    values = json.loads((output / "config.json").read_text())
    expected = {"hidden_size": 28, "num_key_value_heads": groups or 2, "intermediate_size": neurons or 80}
    expected |= {"num_attention_heads": 2 * (groups or 2), "head_dim": 16, "tie_word_embeddings": True}
    assert {name: values[name] for name in expected} == expected
    size = AutoModelForCausalLM.from_pretrained(output).num_parameters()
    assert size == parameter_count(open_checkpoint(str(run)).shape) + 4 * 28  # o's biases, which are zero
    card = (output / "README.md").read_text()
    assert f"pruned after {CUT} steps" in card and "--prune-after" in card


@pytest.mark.slow
def test_masks_reach_their_sizes_and_the_cut_model_learns(tied_qwen, tiny_text, tmp_path):
    """100 steps of pruning; what is cut away is no more than a later step makes good."""
    config = sheared_config(tied_qwen, tiny_text, tmp_path / "run", steps=160, neurons=40)
    config.pruning.prune_after, config.optimizer.lr, config.optimizer.lr_decay_iters = 100.0, 2e-3, None
    config.logging.log_interval, config.logging.eval_interval = 10, 10
    train(config)
    sizes = {line["step"]: line.get("mask_sizes") for line in records(tmp_path / "run")}
    assert sizes[10]["hidden"] > 40 and sizes[110] is None
    assert sizes[100]["hidden"] == pytest.approx(28, abs=3)
    assert sizes[100]["groups"] == pytest.approx(1, abs=0.4)
    assert sizes[100]["neurons"] == pytest.approx(40, abs=6)
    losses = {line["step"]: line["loss"] for line in records(tmp_path / "run", "validation.jsonl")}
    assert losses[160] < 0.8 * losses[0] and losses[160] < losses[110]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"student": "m"}, "the model that --method sheared prunes is --teacher"),
        ({"teacher": None}, "--teacher is missing: the Hugging Face directory of the model to prune"),
        ({"student_hidden_size": None}, "--student-hidden-size is missing: the hidden size to prune to"),
        ({"untie_embeddings_and_output_weights": True}, "cannot go with --method sheared: the pruned model is tied if"),
        ({"alpha": 0.5, "init": "pca"}, "--init and --alpha cannot go with --method sheared"),
        ({"prune_after": 2.5}, "--prune-after 2.5 is no number of steps"),
        ({"mask_lr": 0.0}, "--mask-lr is 0.0; it must be above 0"),
        ({"pretrained_checkpoint": "."}, "--pretrained-checkpoint cannot go with --method sheared"),
        ({"fp8_format": "hybrid", "bf16": True}, "--fp8-format cannot go with --method sheared"),
        ({"method": "logits"}, "--pruned-num-query-groups and --pruned-ffn-hidden-size and --prune-after cannot go"),
    ],
)
def test_flags_that_contradict_the_method_are_refused(tied_qwen, tiny_text, tmp_path, values, message):
    config = sheared_config(tied_qwen, tiny_text, tmp_path / "run")
    change(config, **values)
    with pytest.raises(ConfigError) as caught:
        validate(method_of(config))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "sizes, layout, message",
    [
        ({"hidden": 49}, {}, "--student-hidden-size 49 is above the teacher's 48"),
        ({"groups": 3}, {}, "--pruned-num-query-groups 3 is above the teacher's 2"),
        ({"neurons": 81}, {}, "--pruned-ffn-hidden-size 81 is above the teacher's 80"),
        ({"groups": 1, "neurons": 51}, {"tp": 2}, "--pruned-num-query-groups 1 is not divisible by"),
        ({"hidden": 48, "groups": None, "neurons": 80}, {}, "with the teacher's own sizes prunes nothing"),
    ],
)
def test_shapes_that_cannot_be_pruned_to_are_refused(tied_qwen, tiny_text, tmp_path, sizes, layout, message):
    config = on_layout(sheared_config(tied_qwen, tiny_text, tmp_path / "run", **sizes), **layout)
    with pytest.raises(ConfigError) as caught:
        check(config.resolved(1), 1)
    assert message in str(caught.value)


def test_a_run_cannot_go_on_to_another_shape_and_there_are_no_estimates(tied_qwen, tiny_text, tmp_path):
    config = sheared_config(tied_qwen, tiny_text, tmp_path / "run", steps=1)
    train(config)
    for changes in ({"pruned_num_query_groups": None}, {"pruned_ffn_hidden_size": 40}):
        again = continued(config, steps=4)
        with pytest.raises(ConfigError, match="has been pruned for another shape than the flags ask for"):
            check(replace(again, pruning=replace(again.pruning, **changes)).resolved(1), 1)
    with pytest.raises(ConfigError, match="--dry-run has no estimates for --method sheared yet"):
        dry_run(config.resolved(1), SimpleNamespace(gpu=None, mfu=None), 1)  # type: ignore[arg-type]
