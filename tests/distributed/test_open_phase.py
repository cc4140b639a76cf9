"""--open-after, --method logits and tinybert: a student that has matrices of its own beside the teacher."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_lrc.checkpoints.saved_student import open_checkpoint
from megatron_lrc.config import MATRICES, Config, ConfigError, validate
from megatron_lrc.mcore import distributed
from megatron_lrc.methods import method_of
from megatron_lrc.train import loop
from megatron_lrc.train.start_checks import check
from megatron_lrc.train.step import train_step
from method_runs import OPENED, opened_config
from ranks import run_ranks
from runs import assert_same_opened_student, continued, make_config, on_layout, records, saved_in, train, without_times
from tools_path import convert_to_hf, tool_main

pytestmark = pytest.mark.distributed

verify_model = tool_main("verify_model")


def config_of(how: Any, teacher: str, data: str, run: Path) -> Config:
    """An opened clone, or a whole student of its own."""
    if how in ("mlp", "all"):
        return opened_config(teacher, data, run, how)
    config = make_config(teacher, data, run, steps=3)
    config.model.method, config.projection.init_method_std, config.optimizer.adam_eps = how, 0.05, 1e-5
    return config


def assert_close(first: Path, second: Path) -> None:
    """Everything that two runs have saved."""
    one, two = open_checkpoint(str(first)), open_checkpoint(str(second))
    for tensors, others in (
        (one.projections, two.projections),
        (one.norms, two.norms),
        (one.weights, two.weights),
    ):
        assert set(tensors) == set(others)
        for name in tensors:
            difference = torch.linalg.norm(others[name] - tensors[name])
            assert difference <= 1e-4 * torch.linalg.norm(tensors[name]), name


LAYOUTS = {
    "TP2+SP": (2, {"tp": 2}),
    "PP2": (2, {"pp": 2}),
    "DP2-distributed-optimizer": (2, {"dist_opt": True}),
    "TP2+SPxPP2x2": (4, {"tp": 2, "pp": 2, "chunks": 2}),
}
QUICK = {
    ("mlp", "DP2-distributed-optimizer"),
    ("all", "PP2"),
    ("tinybert", "TP2+SP"),
}


@pytest.mark.parametrize(
    "how, ranks, layout",
    [
        pytest.param(how, *place, id=f"{how}-{name}", marks=[] if (how, name) in QUICK else pytest.mark.slow)
        for how in ("mlp", "all", "logits", "tinybert")
        for name, place in LAYOUTS.items()
    ],
)
def test_runs_are_the_same_on_every_layout(tied_qwen, tiny_text, tmp_path, how, ranks, layout):
    train(config_of(how, tied_qwen, tiny_text, tmp_path / "one"))
    train(on_layout(config_of(how, tied_qwen, tiny_text, tmp_path / "other"), **layout), ranks)
    for line, reference in zip(records(tmp_path / "other"), records(tmp_path / "one"), strict=True):
        for key in ("loss", "lm_loss", "kl_loss", "clone_loss"):
            assert line[key] == pytest.approx(reference[key], rel=1e-5), key
        assert line["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
        for group, norm in reference["grad_norm_by_group"].items():
            assert line["grad_norm_by_group"][group] == (norm and pytest.approx(norm, rel=1e-4)), group
    assert_close(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize(
    "ranks, layout, precision",
    [
        pytest.param(1, {}, "fp32", id="one"),
        pytest.param(1, {}, "bf16", id="one-bf16", marks=pytest.mark.slow),
        pytest.param(2, {"pp": 2}, "fp16", id="PP2-fp16", marks=pytest.mark.slow),
        pytest.param(2, {"dist_opt": True}, "bf16", id="DP2-distributed-optimizer-bf16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("stop", [OPENED - 1, OPENED, OPENED + 1])
def test_a_stop_before_at_or_after_the_opening_changes_nothing(
    tied_qwen, tiny_text, tmp_path, stop, ranks, layout, precision
):
    config = on_layout(opened_config(tied_qwen, tiny_text, tmp_path / "whole", "mlp"), **layout)
    if precision != "fp32":
        config.training = replace(config.training, **{precision: True})
    train(config, ranks)
    stopped = saved_in(config, tmp_path / "stopped")
    train(replace(stopped, training=replace(config.training, train_iters=stop)), ranks)
    assert (open_checkpoint(str(tmp_path / "stopped")).state.changed_at is None) == (stop <= OPENED)
    train(continued(stopped, steps=4), ranks)
    assert without_times(records(tmp_path / "stopped")) == without_times(records(tmp_path / "whole"))
    assert_same_opened_student(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mlp", "all"])
def test_a_checkpoint_loads_on_another_layout_and_in_the_background(tied_qwen, tiny_text, tmp_path, how):
    """Saved every step, so that what is planned changes between two saves."""
    config = opened_config(tied_qwen, tiny_text, tmp_path / "whole", how)
    train(config)
    first = saved_in(config, tmp_path / "moved", async_save=True, save_interval=1)
    train(replace(on_layout(first, dist_opt=True), training=replace(config.training, train_iters=3)), 2)
    train(on_layout(continued(first, steps=4), tp=2), 2)
    assert_close(tmp_path / "whole", tmp_path / "moved")


def look_at_opening(config: Config, steps: int) -> dict[str, float]:
    """On a rank: a step with projections, then the same batches with the student opened after so many steps."""
    trainer = loop.Trainer(config, check(config, distributed.world_size()), distributed.start(config))
    run = trainer.run
    before = train_step(run, trainer._batches(trainer.train_data, 0), max_grad_norm=0.0)  # which is not taken
    (stage,) = run.stages
    gradients = {(site.name, layer): grad.clone() for site, layer, grad in stage.matrix_gradients()}
    tokens = float(before.losses.tokens)
    replaced = [weakref.ref(replica) for replica in run.optimizer.replicas]
    gc.freeze()  # as with background saves
    trainer._change()
    gone = all(reference() is None for reference in replaced)
    own = {trained.name: trained.parameter for trained in stage.trained() if trained.layer is not None}
    values = {name: parameter.detach().clone() for name, parameter in own.items()}
    run.optimizer.lr_schedule.num_steps = steps
    for inner in run.optimizer.optimizer.optimizer.state.values():
        inner["step"] = torch.tensor(float(steps))
    after = train_step(run, trainer._batches(trainer.train_data, 0))
    difference = 0.0
    for site, layer, grad in stage.matrix_gradients():
        expected = gradients[site.name, layer] / tokens
        if site.name in ("gate", "up", "down"):  # reduced and divided already
            difference = max(difference, float((grad - expected).abs().max() / expected.abs().max()))
    lr = config.optimizer.lr
    moves = [float((own[name] - value).square().mean().sqrt()) / lr for name, value in values.items()]
    return {
        "gone": gone,
        "loss before": float(before.losses.lm + before.losses.clone.sum()),
        "loss after": float(after.losses.lm + after.losses.clone.sum()),
        "difference": difference,
        "largest move": max(moves),
        "smallest move": min(moves),
    }


@pytest.mark.parametrize("steps, length", [(0, 1.0), (1, 0.53), (1000, 0.1)])
def test_opening_changes_nothing_but_what_is_trained(tied_qwen, tiny_text, tmp_path, steps, length):
    """Losses and gradients of the student's matrices are those of before; and the first step has Adam's usual length
    at a momentum of one gradient: a whole learning rate before the first step, 0.1 / (1 - 0.9^2) of one after it, 0.1
    late in a run."""
    config = opened_config(tied_qwen, tiny_text, tmp_path / "run", "mlp")
    config.optimizer.clip_grad, config.optimizer.lr_decay_style, config.optimizer.lr_warmup_iters = 0.0, "constant", 0
    config.optimizer.adam_eps = 1e-12
    (found,) = run_ranks(1, look_at_opening, config.resolved(1), steps)
    assert found["loss after"] == pytest.approx(found["loss before"], rel=1e-6)
    assert found["difference"] < 1e-5
    assert found["gone"], "the gradient buffers of before are still there"
    assert 0.5 * length < found["smallest move"] <= found["largest move"] < 1.2 * length


@pytest.mark.parametrize(
    "how", ["mlp", *[pytest.param(how, marks=pytest.mark.slow) for how in ("all", "logits", "tinybert")]]
)
def test_the_student_is_exported_and_verified(tied_qwen, tiny_text, tmp_path, capsys, how):
    """The export's own check compares it with the checkpoint in megatron-core, and verify_model.py once more."""
    run, output = str(tmp_path / "run"), str(tmp_path / "exported")
    train(config_of(how, tied_qwen, tiny_text, tmp_path / "run"))
    saved = open_checkpoint(run)
    own = {name.rpartition(".")[2] for name in saved.weights}
    assert own == {
        "mlp": {"gate", "up", "down"},
    }.get(how, {*MATRICES, "q_bias", "k_bias", "v_bias"} - {"lm_head"})
    kept = {name.rpartition(".")[2] for name in saved.projections}
    assert kept == {"mlp": set(MATRICES) - {"lm_head", "gate", "up"}, "all": {"o", "down"}}.get(how, set())
    assert convert_to_hf(["--load", run, "--output", output]) == 0
    assert verify_model([run, output]) == 0
    card = (Path(output) / "README.md").read_text()
    said = {"mlp": "those of the MLPs were trained themselves", "all": "all of them were"}
    assert said.get(how, "beside") in card
    assert convert_to_hf(["--load", run, "--output", output + "2", "--save-projections"]) == 2
    assert "has matrices of its own" in capsys.readouterr().err


def test_an_opened_run_cannot_go_on_closed(tied_qwen, tiny_text, tmp_path):
    config = opened_config(tied_qwen, tiny_text, tmp_path / "run", "mlp", steps=3)
    train(config)
    again = continued(config, steps=4)
    for changes in ({"open_after": None}, {"open_matrices": "all"}):
        with pytest.raises(ConfigError, match="Repeat --open-after .* and --open-matrices mlp"):
            check(replace(again, projection=replace(again.projection, **changes)).resolved(1), 1)
    other = saved_in(config, tmp_path / "other", pretrained_checkpoint=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="holds a student that was opened after step 2"):
        check(other.resolved(1), 1)


def first_step_of_tinybert(config: Config) -> tuple[list[torch.Tensor], dict[str, list[float | None]], dict]:
    """On a rank: tokens of a step, its losses by layer, the maps it begins with. Saves the student first."""
    trainer = loop.Trainer(config, check(config, distributed.world_size()), distributed.start(config))
    trainer._save()
    (stage,) = trainer.run.stages
    maps = {each.name: each.parameter.detach().clone() for each in stage.trained() if each.name.startswith("maps.")}
    batches = trainer._batches(trainer.train_data, 0)
    tokens = [next(batches)["tokens"] for _ in range(trainer.run.num_microbatches)]
    report = train_step(trainer.run, trainer._batches(trainer.train_data, 0))
    return tokens, report.losses.clone_by_layer(trainer.method), maps


def test_hidden_losses_of_tinybert_are_those_of_transformers_hidden_states(tied_qwen, tiny_text, tmp_path):
    """transformers gives the last layer's hidden state after the final norm only, so that one is left out."""
    config = config_of("tinybert", tied_qwen, tiny_text, tmp_path / "run").resolved(1)
    ((tokens, by_layer, maps),) = run_ranks(1, first_step_of_tinybert, config)
    assert convert_to_hf(["--load", str(tmp_path / "run"), "--output", str(tmp_path / "student")]) == 0
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (tied_qwen, tmp_path / "student")]
    inputs = torch.cat(tokens)
    with torch.no_grad():
        teacher, student = (model(inputs, output_hidden_states=True).hidden_states for model in models)

    def loss(place: int, name: str) -> float:
        return (student[place] @ maps[f"maps.{name}"] - teacher[place]).square().mean().item()

    assert by_layer["embedding"] == [pytest.approx(loss(0, "embedding"), rel=1e-4), None, None, None]
    for layer, found in enumerate(by_layer["hidden"][:-1]):
        assert found == pytest.approx(loss(layer + 1, f"hidden_{layer}"), rel=1e-4)
    assert all(value > 0 for value in by_layer["attention"])


def test_tinybert_refuses_what_it_cannot_compare(tied_qwen, tiny_text, tmp_path):
    config = config_of("tinybert", tied_qwen, tiny_text, tmp_path / "run")
    config.parallel.recompute_granularity = "full"
    with pytest.raises(ConfigError, match="--recompute-granularity cannot go with --method tinybert"):
        validate(method_of(config))
    config.parallel.recompute_granularity, config.projection.init = None, "pca"
    with pytest.raises(ConfigError, match="--init cannot go with --method tinybert, which has no projections"):
        validate(method_of(config))
