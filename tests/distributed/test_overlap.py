"""--overlap-grad-reduce: the same gradients as without it, and sums that do begin while others are computed."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from test_ordinary_training import ordinary_config
from test_training import make_config, on_layout, records, train

from megatron_lrc.clone.projections import Projections
from megatron_lrc.config import Config
from megatron_lrc.train import loop
from ranks import run_ranks

pytestmark = pytest.mark.distributed

BUCKET = 2000  # elements: some 20 buckets


def with_overlap(config: Config, run: object) -> Config:
    parallel = replace(config.parallel, overlap_grad_reduce=True, ddp_bucket_size=BUCKET)
    return replace(config, parallel=parallel, checkpoint=replace(config.checkpoint, save=str(run)))


def with_two_micro_batches(config: Config) -> Config:
    config.training.global_batch_size = 4 * config.training.micro_batch_size
    return config


@pytest.mark.parametrize(
    "is_tied", [pytest.param(True, id="tied"), pytest.param(False, id="untied", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("method", ["lrc", "ordinary", "logits"])
@pytest.mark.parametrize(
    "ranks, layout",
    [
        (2, {}),
        (2, {"dist_opt": True}),
        pytest.param(4, {"pp": 2, "chunks": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2}, marks=pytest.mark.slow),
    ],
    ids=["DP2", "DP2-distributed-optimizer", "DP2xPP2x2", "DP2xTP2"],
)
def test_gradients_are_those_without_overlap(tiny_llama, tiny_text, tmp_path, method, is_tied, ranks, layout):
    make = {"lrc": make_config, "ordinary": ordinary_config, "logits": make_config}[method]
    teacher = tiny_llama(is_tied=is_tied, num_layers=4)
    config = with_two_micro_batches(on_layout(make(teacher, tiny_text, tmp_path / "after", steps=3), **layout))
    config.model.method = method
    train(config, ranks)
    train(with_overlap(config, tmp_path / "during"), ranks)
    for line, reference in zip(records(tmp_path / "during"), records(tmp_path / "after"), strict=True):
        norms, expected = ({"all": one["grad_norm"], **one["grad_norm_by_group"]} for one in (line, reference))
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-6)
        assert norms.keys() == expected.keys()
        for name, norm in expected.items():
            assert norms[name] == (norm and pytest.approx(norm, rel=1e-6)), name


def note_order_of_work(config: Config) -> None:
    """A run of two steps; the first one finds out what buckets wait for."""
    order: list[str] = []
    start_sum, add_gradient = _ParamAndGradBucketGroup.start_grad_sync, Projections._add_gradient

    def noted_sum(*args: Any, **kwargs: Any) -> None:
        order.append("sum")
        start_sum(*args, **kwargs)

    def noted_addition(*args: Any) -> None:
        order.append("pull back")
        add_gradient(*args)

    with (
        patch.object(_ParamAndGradBucketGroup, "start_grad_sync", noted_sum),
        patch.object(Projections, "_add_gradient", noted_addition),
    ):
        loop.train(config)
    second = order[len(order) // 2 :]
    assert second.count("sum") == order.count("sum") / 2 > 5
    begun = [second[:place].count("sum") for place, what in enumerate(second) if what == "pull back"]
    # Before the last matrix is pulled back all sums have begun but that of its own bucket, and none before the first
    # but that of the gains.
    assert begun[0] <= 1 and begun[-1] == second.count("sum") - 1, second


def test_sums_of_projections_begin_during_the_pull_back(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "run", steps=2)
    config = with_overlap(with_two_micro_batches(config), tmp_path / "run").resolved(2)
    run_ranks(2, note_order_of_work, config)
