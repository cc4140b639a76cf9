"""Losses and gradients that are not finite, or jump: named, skipped, and the end of the run when there are too many."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from disturbed_training import train_spoiled
from megatron_lrc.config import Config
from megatron_lrc.mcore import distributed
from megatron_lrc.train import loop
from megatron_lrc.train.start_checks import check
from ranks import run_ranks
from runs import assert_same_parameters, continued, make_config, on_layout, records, train


def spoiled_run(tiny_llama, tiny_text, run: Path, kind: str, steps: tuple[int, ...], limit: int) -> list[str]:
    config = make_config(tiny_llama(num_layers=4), tiny_text, run, steps=6)
    config.training.max_skipped_steps = limit
    config = on_layout(config, pp=2)
    return run_ranks(2, train_spoiled, config.resolved(2), 2, kind, steps)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind, where",
    [
        ("loss", "the clone loss of layer 2, term gate, is not finite on rank 1"),
        # Spoiled below layer 2's FFN matrices: the first to see it is the o matrix of the same layer.
        ("gradient", "the gradient of layer 2, term o, is not finite on rank 1"),
    ],
)
def test_too_many_bad_steps_in_a_row_stop_the_run_and_lose_nothing(tiny_llama, tiny_text, tmp_path, kind, where):
    stopped = spoiled_run(tiny_llama, tiny_text, tmp_path / "run", kind, (3, 4, 5, 6), limit=2)
    assert stopped[0] == stopped[1]
    assert "stopped at step 4 after 2 skipped steps in a row" in stopped[0] and where in stopped[0]
    good = make_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "good", steps=2)
    train(on_layout(good, pp=2), 2)
    assert_same_parameters(tmp_path / "run", tmp_path / "good")


@pytest.mark.distributed
def test_a_single_bad_step_is_skipped_and_the_log_stays_valid_json(tiny_llama, tiny_text, tmp_path):
    assert spoiled_run(tiny_llama, tiny_text, tmp_path / "run", "loss", (2, 4), limit=2) == ["", ""]
    lines = records(tmp_path / "run")
    assert [line["loss"] is None for line in lines] == [False, True, False, True, False, False]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def train_with_a_jump(config: Config, at: int, factor: float) -> tuple[float, int, str]:
    """Train; in one step multiply the LM head's gradient. The gradient norms' running mean and count; what was said."""
    trainer = loop.Trainer(config, check(config, distributed.world_size()), distributed.start(config))

    def scale(grad: torch.Tensor) -> torch.Tensor:
        return grad * factor if trainer.state.step + 1 == at else grad

    for stage in trainer.run.stages:
        for weight in stage.cloned_weights:
            if weight.site.name == "lm_head":
                weight.student.register_hook(scale)
    trainer.train()
    return trainer.state.grad_norm_mean, trainer.state.grad_norm_count, trainer.guard.last_words


@pytest.mark.distributed
def test_a_spike_is_skipped_and_said_and_the_mean_survives_a_restart(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "whole", steps=26)
    config.training.spike_factor = 4.0
    config.logging.eval_iters = 0
    config = on_layout(config, pp=2)
    whole = run_ranks(2, train_with_a_jump, config.resolved(2), 24, 1000.0)
    assert whole[0] == whole[1] and whole[0][1] == 25
    assert "is above --spike-factor 4.0 times its running mean" in whole[0][2]
    assert [line["skipped_steps"] for line in records(tmp_path / "whole")] == [0] * 23 + [1, 0, 0]

    stopped = replace(config, checkpoint=replace(config.checkpoint, save=str(tmp_path / "stopped")))
    train(replace(stopped, training=replace(config.training, train_iters=22)), 2)
    assert run_ranks(2, train_with_a_jump, continued(stopped, steps=26).resolved(2), 24, 1000.0) == whole
    assert_same_parameters(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.distributed
def test_every_layers_clone_loss_arrives_from_every_stage(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "run", steps=1)
    config.loss.clone_terms = ["q", "down:1-2"]
    train(on_layout(config, pp=2, chunks=2), 2)
    (line,) = records(tmp_path / "run")
    parts = line["clone_by_layer"]
    assert [value is not None for value in parts["down"]] == [False, True, True, False]
    assert parts["gate"] == [None] * 4 and all(value > 0 for value in parts["q"])
    on = [value for values in parts.values() for value in values if value is not None]
    assert sum(on) == pytest.approx(line["clone_loss"], rel=1e-12)
