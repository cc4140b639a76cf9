"""What a record says of the steps since the record before."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from disturbed_training import train_spoiled
from megatron_lrc.config import Config
from megatron_lrc.data.datasets import build_datasets
from megatron_lrc.methods import method_of
from megatron_lrc.train.boards import scalars
from megatron_lrc.train.progress import losses_text
from megatron_lrc.train.step import Interval, LossTotals, StepReport
from ranks import run_ranks
from runs import make_config, on_layout, records, train

LOSSES = ("loss", "lm_loss", "kl_loss", "clone_loss", "teacher_lm_loss")
OWN = ("step", "tokens", "grad_norm", "grad_norm_by_group", "lr")


@pytest.fixture
def seven_step_config(tiny_llama, tiny_text, tmp_path) -> Config:
    """A run of seven steps, a record each."""
    config = make_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "each", steps=7)
    config.logging.eval_iters, config.training.max_skipped_steps = 0, 5
    return config


def every_third_step(config: Config, run: Path) -> Config:
    logging = replace(config.logging, log_interval=3)
    return replace(config, checkpoint=replace(config.checkpoint, save=str(run)), logging=logging)


def mean(lines: list[dict], key: str) -> float:
    return sum(line[key] for line in lines) / len(lines)


def assert_means_of(line: dict, steps: list[dict]) -> None:
    """Every step here has the same number of tokens."""
    for key in LOSSES:
        assert line[key] == pytest.approx(mean(steps, key), rel=1e-12), key
    for term, layers in line["clone_by_layer"].items():
        for layer, value in enumerate(layers):
            parts = [step["clone_by_layer"][term][layer] for step in steps]
            assert value == pytest.approx(sum(parts) / len(parts), rel=1e-12), (term, layer)


@pytest.mark.distributed
def test_losses_are_means_over_the_steps_since_the_last_record(seven_step_config, tmp_path):
    train(on_layout(seven_step_config, pp=2), 2)
    train(on_layout(every_third_step(seven_step_config, tmp_path / "third"), pp=2), 2)
    steps, lines = records(tmp_path / "each"), records(tmp_path / "third")
    assert [line["step"] for line in lines] == [3, 6, 7]
    for line, since in zip(lines, (steps[:3], steps[3:6], steps[6:]), strict=True):
        assert_means_of(line, since)
        assert line["skipped_steps"] == 0
        assert {key: line[key] for key in OWN} == {key: since[-1][key] for key in OWN}
        parts = line["grad_norm_by_group"].values()
        assert math.hypot(*parts) == pytest.approx(line["grad_norm"], rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("kind, without_loss", [("loss", (2, 4, 5, 6)), ("gradient", ())])
def test_skipped_steps_are_counted_and_left_out_of_losses_that_they_would_spoil(
    seven_step_config, tmp_path, kind, without_loss
):
    for run in (seven_step_config, every_third_step(seven_step_config, tmp_path / "third")):
        run = on_layout(run, pp=2).resolved(2)
        assert run_ranks(2, train_spoiled, run, 2, kind, (2, 4, 5, 6)) == ["", ""]
    steps, lines = records(tmp_path / "each"), records(tmp_path / "third")
    assert [line["skipped_steps"] for line in steps] == [0, 1, 0, 1, 1, 1, 0]
    assert [line["skipped_steps"] for line in lines] == [1, 3, 0]
    for line, since in zip(lines, (steps[:3], steps[3:6], steps[6:]), strict=True):
        kept = [step for step in since if step["step"] not in without_loss]
        if kept:
            assert_means_of(line, kept)
        else:
            assert all(line[key] is None for key in LOSSES)


def test_records_say_how_much_of_the_teacher_its_top_k_is(seven_step_config, tiny_llama):
    config = seven_step_config
    config.training.train_iters, config.training.micro_batch_size, config.training.global_batch_size = 1, 1, 1
    config.logging.eval_iters, config.loss.kl_top_k, config.loss.kl_temperature = 1, 4, 1.0
    train(config)
    (trained,), (validated, _) = records(config.checkpoint.save), records(config.checkpoint.save, "validation.jsonl")
    for record, dataset in zip((trained, validated), build_datasets(config), strict=True):
        with torch.no_grad():
            logits = LlamaForCausalLM.from_pretrained(tiny_llama(num_layers=4))(dataset[0]["tokens"][None]).logits[0]
        expected = logits.softmax(-1).topk(4).values.sum(-1).mean().item()
        assert record["kl_top_k_mass"] == pytest.approx(expected, rel=1e-5)
        assert f" kl {record['kl_loss']:.3g} (of {expected:.1%}) " in losses_text(record)


@pytest.mark.distributed
def test_a_step_with_more_tokens_weighs_more():
    def report(tokens: float, lm: float, *, is_finite: bool = True) -> StepReport:
        per_token = torch.tensor(lm, dtype=torch.float64)
        clone = per_token.expand(2, 7) * tokens
        others = dict.fromkeys(("kl", "teacher_lm", "teacher_kl", "same_top1", "covered"), per_token * 0)
        losses = LossTotals(lm=per_token * tokens, **others, tokens=torch.tensor(tokens), clone=clone)
        return StepReport(losses, is_finite, 1.0, None, is_finite)

    interval, method = Interval((2, 7), torch.device("cpu")), method_of(Config())
    for step in (report(10.0, 1.0), report(30.0, 2.0), report(20.0, math.nan, is_finite=False)):
        interval.add(step)
    record = interval.record(method)
    assert record["lm_loss"] == 1.75 and record["clone_by_layer"]["down"] == [1.75, 1.75]
    assert record["skipped_steps"] == 1 and interval.steps == 3
    interval.reset()
    interval.add(report(10.0, 3.0))
    assert interval.record(method)["lm_loss"] == 3.0 and interval.steps == 1


def test_tensorboard_has_a_name_for_every_part_that_is_on():
    record = {
        "step": 3,
        "loss": 1.0,
        "teacher_lm_loss": None,
        "clone_by_layer": {"q": [2.0, None]},
        "grad_norm_by_group": {"q": 3.0, "lm_head": None},
        "effective_rank": {"student": [4.0, 5.0]},
    }
    shown = {
        "train/loss": 1.0,
        "train_clone/q": 2.0,
        "train_grad_norm/q": 3.0,
        "train_effective_rank/student": 4.5,
    }
    assert scalars("train", record) == shown
    assert scalars("train", record, with_layers=True) == shown | {
        "train_layers/clone_q_00": 2.0,
        "train_layers/effective_rank_student_00": 4.0,
        "train_layers/effective_rank_student_01": 5.0,
    }


@pytest.mark.distributed
@pytest.mark.parametrize("is_masked", [False, True])
def test_a_samples_loss_is_its_mean_over_all_labels_or_over_all_but_the_last(seven_step_config, tiny_llama, is_masked):
    """The teacher's own loss on one sample, against transformers."""
    config = seven_step_config
    config.training.train_iters, config.training.micro_batch_size, config.training.global_batch_size = 0, 1, 1
    config.logging.eval_iters, config.data.mask_last_label = 1, is_masked
    train(config)
    (record,) = records(config.checkpoint.save, "validation.jsonl")
    _, valid = build_datasets(config)
    sample = valid[0]
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(tiny_llama(num_layers=4))(sample["tokens"][None]).logits[0]
    count = len(sample["labels"]) - is_masked
    expected = torch.nn.functional.cross_entropy(logits[:count], sample["labels"][:count]).item()
    assert record["teacher_lm_loss"] == pytest.approx(expected, rel=1e-5)
