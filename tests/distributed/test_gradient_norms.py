"""Gradient norms by group: together the whole gradient's norm, and each the same on every layout."""

import math
from dataclasses import replace

import pytest

from megatron_lrc.config import Config
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.stages import GRADIENT_GROUPS
from megatron_lrc.train import loop
from megatron_lrc.train.start_checks import check
from megatron_lrc.train.step import StepReport, train_step
from ranks import run_ranks
from runs import make_config, on_layout


def one_step(config: Config) -> StepReport:
    trainer = loop.Trainer(config, check(config, distributed.world_size()), distributed.start(config))
    batches = trainer._batches(trainer.train_data, 0)
    return train_step(trainer.run, batches, with_group_norms=True)


def reports(config: Config, ranks: int = 1, **layout) -> list[StepReport]:
    return run_ranks(ranks, one_step, on_layout(config, **layout).resolved(ranks))


def norms_of(report: StepReport) -> dict[str, float]:
    """Of the groups that there are."""
    assert report.grad_norm_by_group is not None and tuple(report.grad_norm_by_group) == GRADIENT_GROUPS
    return {group: norm for group, norm in report.grad_norm_by_group.items() if norm is not None}


@pytest.fixture
def one_step_config(tiny_text, tmp_path) -> Config:
    config = make_config("", tiny_text, tmp_path / "run", steps=1)
    config.checkpoint.save, config.logging.eval_iters = None, 0
    return config


@pytest.mark.distributed
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "ranks, layout",
    [(2, {"tp": 2}), (2, {"pp": 2}), (2, {}), (2, {"dist_opt": True}), (2, {"pp": 2, "chunks": 2}), (2, {"cp": 2})]
    + [pytest.param(4, {"tp": 2, "dist_opt": True}, marks=pytest.mark.slow)],
    ids=[
        "TP2+SP",
        "PP2",
        "DP2",
        "DP2-distributed-optimizer",
        "PP2-interleaved-x2",
        "CP2",
        "TP2+SPxDP2-distributed-optimizer",
    ],
)
def test_group_norms_are_those_of_one_process_and_make_up_the_gradient_norm(
    tiny_llama, one_step_config, ranks, layout, is_tied
):
    one_step_config.model.teacher = tiny_llama(is_tied=is_tied, num_layers=4)
    (reference,) = reports(one_step_config)
    assert ("lm_head" in norms_of(reference)) != is_tied and all(norms_of(reference).values())
    for report in (reference, *reports(one_step_config, ranks, **layout)):
        assert math.hypot(*norms_of(report).values()) == pytest.approx(report.grad_norm, rel=1e-5)
        assert norms_of(report) == pytest.approx(norms_of(reference), rel=1e-4)


@pytest.mark.distributed
def test_group_norms_make_up_the_gradient_norm_of_a_bf16_run(tiny_llama, one_step_config):
    config = replace(one_step_config, training=replace(one_step_config.training, bf16=True))
    config.model.teacher = tiny_llama(is_tied=True)
    for report in reports(config, 2, dist_opt=True):
        assert math.hypot(*norms_of(report).values()) == pytest.approx(report.grad_norm, rel=1e-5)
