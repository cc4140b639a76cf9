"""--method ordinary in whole runs: the same on every layout, after a stop as without one, and apart from clones."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from config_cases import change
from disturbed_training import train_spoiled, train_with_slow_writers
from hf_teachers import write_qwen2, write_qwen3
from megatron_lrc.checkpoints.run_directory import checkpoint_path
from megatron_lrc.config import Config, ConfigError, validate
from megatron_lrc.estimate.flops import head_flops, layer_flops
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.methods import method_of
from megatron_lrc.train import loop
from megatron_lrc.train.start_checks import check
from megatron_lrc.verify.weight_streams import open_student
from method_runs import ordinary, ordinary_config
from ranks import run_ranks
from runs import (
    assert_close_weights,
    assert_same_weights,
    continued,
    for_steps,
    make_config,
    on_layout,
    records,
    saved_in,
    train,
    weights_of,
    without_times,
)
from tools_path import convert_to_hf

pytestmark = pytest.mark.distributed


def from_scratch(config: Config, teacher: str, hidden_size: int) -> Config:
    model = replace(config.model, student=None, teacher=teacher, student_hidden_size=hidden_size)
    return replace(config, model=model, projection=replace(config.projection, init_method_std=0.05))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """`qwen(2, is_tied=...)`, `qwen(3, ...)` -> directory."""

    def directory(version: int, **settings) -> str:
        folder = tmp_path_factory.mktemp("qwen")
        {2: write_qwen2, 3: write_qwen3}[version](folder, **settings)
        return str(folder)

    return directory


@pytest.mark.parametrize("version, is_tied", [(2, True), (3, False)])
@pytest.mark.parametrize(
    "ranks, layout",
    [(2, {"tp": 2}), (2, {"pp": 2}), (2, {"cp": 2}), (2, {"dist_opt": True}), (4, {"tp": 2, "pp": 2, "chunks": 2})],
    ids=["TP2+SP", "PP2", "CP2", "DP2-distributed-optimizer", "TP2+SPxPP2x2"],
)
def test_two_steps_give_the_same_losses_norms_and_weights_on_every_layout(
    qwen, tiny_text, tmp_path, version, is_tied, ranks, layout
):
    config = ordinary_config(qwen(version, is_tied=is_tied, num_layers=4), tiny_text, tmp_path / "one", steps=2)
    config.optimizer.clip_grad, config.optimizer.adam_eps = 0.5, 1e-5  # gradients of rounding alone move nothing
    train(config)
    train(on_layout(saved_in(config, tmp_path / "other"), **layout), ranks)

    for name in ("metrics.jsonl", "validation.jsonl"):
        for line, reference in zip(records(tmp_path / "other", name), records(tmp_path / "one", name), strict=True):
            assert line["lm_loss"] == line["loss"] == pytest.approx(reference["loss"], rel=1e-5)
            assert not {"kl_loss", "clone_loss", "teacher_lm_loss", "clone_by_layer"} & set(line)
    for line, reference in zip(records(tmp_path / "other"), records(tmp_path / "one"), strict=True):
        norms = {group: norm for group, norm in line["grad_norm_by_group"].items() if norm is not None}
        assert ("lm_head" in norms) != is_tied and ("biases" in norms) == (version == 2)
        assert line["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
        assert math.hypot(*norms.values()) == pytest.approx(line["grad_norm"], rel=1e-5)
        for group, norm in norms.items():
            assert norm == pytest.approx(reference["grad_norm_by_group"][group], rel=1e-4), group
    assert_close_weights(tmp_path / "one", tmp_path / "other", within=1e-4)


@pytest.mark.parametrize(
    "ranks, layout, precision",
    [
        pytest.param(1, {}, "fp32", id="one"),
        pytest.param(2, {"pp": 2}, "bf16", id="PP2-bf16", marks=pytest.mark.slow),
        pytest.param(2, {"tp": 2}, "fp16", id="TP2-fp16", marks=pytest.mark.slow),
        pytest.param(2, {"dist_opt": True}, "bf16", id="DP2-distributed-optimizer-bf16"),
        pytest.param(2, {"cp": 2, "dist_opt": True}, "fp32", id="CP2-distributed-optimizer", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_stopped_goes_on_bit_for_bit(qwen, tiny_text, tmp_path, ranks, layout, precision):
    config = ordinary_config(qwen(2, is_tied=True), tiny_text, tmp_path / "whole", steps=4)
    config = on_layout(config, **layout)
    config.training.bf16, config.training.fp16 = precision == "bf16", precision == "fp16"
    config.training.initial_loss_scale, config.training.loss_scale_window = 2.0**8, 2
    config.optimizer.weight_decay = 0.01
    train(config, ranks)
    stopped = saved_in(config, tmp_path / "stopped", async_save=True)
    run_ranks(ranks, train_with_slow_writers, for_steps(stopped, 2).resolved(ranks))
    train(for_steps(continued(stopped, steps=4), 4), ranks)

    assert without_times(records(tmp_path / "stopped")) == without_times(records(tmp_path / "whole"))
    assert records(tmp_path / "stopped", "validation.jsonl")[-1] == records(tmp_path / "whole", "validation.jsonl")[-1]
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "first_dist_opt, later_dist_opt", [(False, True), pytest.param(True, False, marks=pytest.mark.slow)]
)
def test_a_checkpoint_loads_on_another_layout(tiny_llama, tiny_text, tmp_path, is_tied, first_dist_opt, later_dist_opt):
    """Whose vocabulary is padded differently, to 384 rows at TP 1 and 512 at TP 2; and with the other optimizer."""
    model = tiny_llama(is_tied=is_tied, num_layers=4)
    config = ordinary_config(model, tiny_text, tmp_path / "whole", steps=5)
    train(config)
    moved = saved_in(config, tmp_path / "moved")
    train(on_layout(for_steps(moved, 2), tp=2, dist_opt=first_dist_opt), 2)
    train(on_layout(continued(moved, steps=4), pp=2, chunks=2, dist_opt=later_dist_opt), 2)
    train(on_layout(continued(moved, steps=5), tp=2, dist_opt=first_dist_opt), 2)
    for line, reference in zip(records(tmp_path / "moved"), records(tmp_path / "whole"), strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=str)
def test_a_new_model_starts_the_same_on_every_layout_and_as_megatron_initialises_it(qwen, tiny_text, tmp_path, layout):
    """Only config.json of the teacher is needed."""
    teacher = Path(qwen(2, is_tied=True))
    (teacher / "model.safetensors").unlink()
    config = from_scratch(ordinary_config("", tiny_text, tmp_path / "one", steps=0), str(teacher), 64)
    config.data.tokenizer_model = None
    train(config)
    train(on_layout(saved_in(config, tmp_path / "two"), **layout), 2)
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    for name, weight in weights_of(tmp_path / "one").items():
        kind = name.rpartition(".")[2]
        if kind.endswith("bias"):
            assert not weight.any(), name
        elif weight.dim() == 1:
            assert weight.eq(1).all(), name
        else:
            std = 0.05 / math.sqrt(2 * 2) if kind in ("o", "down") else 0.05
            assert weight.std().item() == pytest.approx(std, rel=0.06), name
            assert weight.mean().abs().item() < 0.1 * std, name
    train(for_steps(continued(config, steps=1), 1))
    assert all(records(tmp_path / "one")[-1]["grad_norm_by_group"][kind] for kind in ("q", "biases", "embed", "norms"))


def test_training_lowers_the_held_out_loss_of_a_new_model(tiny_llama, tiny_text, tmp_path):
    config = ordinary_config("", tiny_text, tmp_path / "run", steps=40)
    config = from_scratch(config, tiny_llama(), 32)
    config.optimizer.lr, config.optimizer.lr_decay_iters, config.logging.log_effective_rank = 6e-3, None, True
    train(config)
    before, after = records(tmp_path / "run", "validation.jsonl")
    assert before["lm_loss"] == pytest.approx(math.log(301), rel=0.05)
    assert after["lm_loss"] < 0.75 * before["lm_loss"]
    assert set(after["effective_rank"]) == {"student"} and len(after["effective_rank"]["student"]) == 3


def test_tied_ends_stay_bit_identical_and_the_shares_of_flops_are_those_of_one_model(tiny_llama, tiny_text, tmp_path):
    model = tiny_llama(is_tied=True)
    config = on_layout(ordinary_config(model, tiny_text, tmp_path / "run", steps=3), pp=2, dist_opt=True)
    first, *_, last = run_ranks(4, ends_after_training, config.resolved(4))
    assert torch.equal(first, last)
    tflops, shape = records(tmp_path / "run")[-1]["tflops"], describe_teacher(model).shape
    assert tflops["teacher_forward"] == tflops["projections"] == 0
    forward = layer_flops(shape, (16 + 1) / 2) * shape.num_layers + head_flops(shape)
    per_second = records(tmp_path / "run")[-1]["tokens_per_second"] / 4
    assert tflops["student_forward"] == pytest.approx(forward * per_second / 1e12)
    assert tflops["student_backward"] == pytest.approx(2 * forward * per_second / 1e12)


def ends_after_training(config: Config) -> torch.Tensor:
    trainer = loop.Trainer(config, check(config, 4), loop.distributed.start(config))
    trainer.train()
    (tied,) = [trained for stage in trainer.run.stages for trained in stage.trained() if trained.is_at_both_ends]
    return tied.parameter.detach().clone()


def test_gradients_that_are_not_finite_are_named_and_stop_the_run(tiny_llama, tiny_text, tmp_path):
    config = on_layout(ordinary_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "run", steps=4), pp=2)
    config.training.max_skipped_steps = 2
    words = run_ranks(2, train_spoiled, config.resolved(2), 2, "gradient", (3, 4))
    assert "the gradient of layer 2, term o, is not finite on rank 1" in words[0]
    assert [line["skipped_steps"] for line in records(tmp_path / "run")] == [0, 0, 1]  # stopped in the next one


@pytest.mark.parametrize("version, is_tied", [(2, False), (3, True)])
def test_an_export_has_the_trained_weights_and_the_logits_of_the_engine(qwen, tiny_text, tmp_path, version, is_tied):
    """Saved at TP 2, where the vocabulary is padded; a checkpoint of 0 steps gives back the model it started from."""
    model = qwen(version, is_tied=is_tied, dtype=torch.bfloat16)
    config = on_layout(ordinary_config(model, tiny_text, tmp_path / "run", steps=0), tp=2)
    config.training.bf16, config.optimizer.lr = True, 0.02  # a step that bf16's rounding does not undo
    train(config, 2)
    train(on_layout(continued(config, steps=2), tp=2), 2)
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for step in (0, 2):
        path = checkpoint_path(tmp_path / "run", step)
        assert convert_to_hf(["--load", str(path), "--output", str(tmp_path / f"{step}"), "--arch", "native"]) == 0
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / f"{step}").state_dict()
        assert set(exported) == set(start)
        for name in start:
            assert exported[name].dtype == torch.bfloat16
            assert torch.equal(exported[name], start[name]) == (step == 0), name


def test_another_run_starts_from_the_weights_of_a_checkpoint(tiny_llama, tiny_text, tmp_path):
    config = ordinary_config(tiny_llama(), tiny_text, tmp_path / "first", steps=2)
    train(config)
    second = saved_in(config, tmp_path / "second", pretrained_checkpoint=str(tmp_path / "first"))
    train(for_steps(second, 1))
    before = records(tmp_path / "first", "validation.jsonl")[-1]
    assert records(tmp_path / "second", "validation.jsonl")[0]["lm_loss"] == before["lm_loss"]


def test_a_checkpoint_is_refused_by_the_other_method_and_for_another_model(tiny_llama, qwen, tiny_text, tmp_path):
    model = tiny_llama()
    clone = make_config(model, tiny_text, tmp_path / "clone", steps=1)
    alone = ordinary_config(model, tiny_text, tmp_path / "alone", steps=1)
    train(clone)
    train(alone)
    for config, other, method in ((clone, alone, "ordinary"), (alone, clone, "lrc")):
        for flag in ("load", "pretrained_checkpoint"):
            with pytest.raises(ConfigError, match=f"of a run with --method {method}, and cannot be continued with"):
                check(saved_in(config, tmp_path / "new", **{flag: other.checkpoint.save}), 1)
    other_model = ordinary(continued(alone, steps=2), qwen(2))
    with pytest.raises(ConfigError, match="is not the model that .* its config.json differs"):
        check(other_model, 1)
    with pytest.raises(ConfigError, match="is not the model that .* its config.json differs"):
        open_student(str(tmp_path / "alone"), qwen(2))
    flags = ["--load", str(tmp_path / "alone"), "--output", str(tmp_path / "x")]
    assert convert_to_hf([*flags, "--save-projections"]) == 2
    assert checkpoint_path(tmp_path / "alone", 1).is_dir() and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"student": None}, "--method ordinary needs a model: --student DIR"),
        ({"student": None, "teacher": "m"}, "--method ordinary needs a model: --student DIR"),
        ({"teacher": "m"}, "--teacher cannot go with it"),
        ({"student_hidden_size": 8}, "--student-hidden-size cannot go with it"),
        ({"student": "/no/such"}, "--student /no/such is not a directory"),
        ({"alpha": 0.5, "kl_weight": 0.0}, "--alpha and --kl-weight cannot go with --method ordinary"),
        ({"init": "pca"}, "--init cannot go with --method ordinary"),
        ({"method": "lrc"}, "is the model that --method ordinary trains"),
    ],
)
def test_flags_that_contradict_the_method_are_refused(tiny_llama, tiny_text, tmp_path, values, message):
    config = ordinary_config(tiny_llama(), tiny_text, tmp_path / "run", steps=1)
    change(config, **values)
    with pytest.raises(ConfigError) as caught:
        validate(method_of(config))
    assert message in str(caught.value)


def test_errors_about_the_model_name_the_flag_that_was_given(tiny_llama, tiny_text, tmp_path):
    model = tmp_path / "my-teacher"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("")
    with pytest.raises(ConfigError) as caught:
        check(ordinary_config(str(model), tiny_text, tmp_path / "run", steps=1), 1)
    assert str(caught.value).startswith(f"--student {model}: config.json has architectures")
    assert "teacher" not in str(caught.value).replace(str(model), "")
