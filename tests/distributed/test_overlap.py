"""--overlap-grad-reduce and --overlap-param-gather: the same as without them, and communication that does begin while
others are computed, and has ended when its result is read."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from megatron_lrc.clone.projections import Projections
from megatron_lrc.config import Config
from megatron_lrc.mcore import checkpoint
from megatron_lrc.mcore.optimizer import StageOptimizer
from megatron_lrc.methods.lrc import paired_model
from megatron_lrc.train import loop
from megatron_lrc.train.step import Run
from method_runs import opened_config, ordinary_config, sheared_config
from ranks import run_ranks
from runs import assert_same_opened_student, continued, make_config, on_layout, records, train, without_times

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


@pytest.mark.parametrize("recompute", ["full", "mlp"])
def test_gradients_with_recomputation_are_those_without_overlap(tiny_llama, tiny_text, tmp_path, recompute):
    """Recomputed layers have backward passes of their own, inside the other."""
    config = with_two_micro_batches(make_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "after", steps=3))
    config.parallel.recompute_granularity = "full" if recompute == "full" else "selective"
    config.parallel.recompute_modules = ["mlp"] if recompute == "mlp" else ["core_attn"]
    train(config, 2)
    train(with_overlap(config, tmp_path / "during"), 2)
    for line, reference in zip(records(tmp_path / "during"), records(tmp_path / "after"), strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-6)
        for name, norm in reference["grad_norm_by_group"].items():
            assert line["grad_norm_by_group"][name] == (norm and pytest.approx(norm, rel=1e-6)), name


def note_order_of_work(config: Config) -> None:
    """A run of two steps; the first one finds out what buckets wait for."""
    order: list[str] = []
    start_sum, add_gradient, pull_back = (
        _ParamAndGradBucketGroup.start_grad_sync,
        Projections._add_gradient,
        Run.pull_back,
    )

    def noted_sum(*args: Any, **kwargs: Any) -> None:
        order.append("sum")
        start_sum(*args, **kwargs)

    def noted_addition(*args: Any) -> None:
        order.append("pull back")
        add_gradient(*args)

    def noted_end(run: Run) -> None:
        order.append("end of backward")
        pull_back(run)

    with (
        patch.object(_ParamAndGradBucketGroup, "start_grad_sync", noted_sum),
        patch.object(Projections, "_add_gradient", noted_addition),
        patch.object(Run, "pull_back", noted_end),
    ):
        loop.train(config)
    second = order[len(order) // 2 :]
    assert second.count("sum") == order.count("sum") / 2 > 5
    assert second[-1] == "end of backward", second
    begun = [second[:place].count("sum") for place, what in enumerate(second) if what == "pull back"]
    # Few wait for the end: before the last matrix is pulled back all have begun but that of its own bucket.
    assert begun[len(begun) // 2] >= second.count("sum") // 3 and begun[-1] == second.count("sum") - 1, second


def test_sums_of_projections_begin_during_the_last_backward_pass(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "run", steps=2)
    config = with_overlap(with_two_micro_batches(config), tmp_path / "run").resolved(2)
    run_ranks(2, note_order_of_work, config)


# ---------------------------------------------------------------------------------------------- --overlap-param-gather


def with_gather(config: Config, run: object) -> Config:
    config = with_overlap(config, run)
    return replace(config, parallel=replace(config.parallel, overlap_param_gather=True))


def opened(teacher: str, data: str, run: Path, *, steps: int) -> Config:
    return opened_config(teacher, data, run, "mlp", steps=steps)


def pruned(teacher: str, data: str, run: Path, *, steps: int) -> Config:
    return sheared_config(teacher, data, run, steps=steps, groups=None)


@pytest.mark.parametrize(
    "make, ranks, layout",
    [
        *[pytest.param(make, 2, {}, id=f"DP2-{make.__name__}") for make in (ordinary_config, opened, pruned)],
        *[
            pytest.param(make, 4, layout, id=f"{name}-{make.__name__}", marks=pytest.mark.slow)
            for name, layout in {"DP2xPP2x2": {"pp": 2, "chunks": 2}, "DP2xTP2": {"tp": 2}}.items()
            for make in (make_config, ordinary_config, opened, pruned)  # opened begins as make_config's goes on
        ],
    ],
)
def test_runs_are_those_without_overlapped_gathers(tiny_llama, tiny_text, tmp_path, make, ranks, layout):
    """With checkpoints and validations between steps, a change of what is trained (`opened`, `pruned`), a stop."""
    teacher = tiny_llama(is_tied=False, num_layers=4)
    config = on_layout(make(teacher, tiny_text, tmp_path, steps=3), dist_opt=True, **layout)
    config = with_two_micro_batches(config)
    config.checkpoint.save_interval, config.logging.eval_interval = 1, 2
    for change in (with_overlap, with_gather):
        run = change(config, tmp_path / change.__name__)
        train(run, ranks)
        train(continued(run, steps=4), ranks)
    plain, overlapped = (tmp_path / change.__name__ for change in (with_overlap, with_gather))
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert without_times(records(overlapped, name)) == without_times(records(plain, name))
    assert len(records(plain)) == 4
    assert_same_opened_student(plain, overlapped)


def note_order_of_gathers(config: Config) -> None:
    """Three steps. Fails where a parameter is read that is not whole; notes how many gathers run as each P is."""
    under_way: list[int] = []
    order: list[str] = []
    replicas: list[Any] = []
    full, run_stage, save = Projections.full, paired_model.run_stage, checkpoint._sharded_model

    def groups() -> list[_ParamAndGradBucketGroup]:
        return [group for replica in replicas for group in replica.bucket_groups]

    def count() -> int:
        return sum(group.param_gather_handle is not None for group in groups())

    def noted_read(projections: Projections, name: str) -> Any:
        matrix = projections.matrix(name)
        for group in groups():
            if matrix in group.params:
                assert group.param_gather_handle is None and group.param_gather_dispatched, name
        under_way.append(count())
        order.append("read")
        return full(projections, name)

    def noted_pass(model: Any, *args: Any) -> Any:
        is_student = model.config.hidden_size == config.model.student_hidden_size
        order.append("student" if is_student else "teacher")
        assert not is_student or count() == 0
        return run_stage(model, *args)

    def noted_save(stages: Any) -> Any:
        order.append("save")
        assert count() == 0
        return save(stages)

    def noted_step(optimizer: StageOptimizer, *args: Any, **kwargs: Any) -> Any:
        replicas[:] = optimizer.replicas
        return clip_and_step(optimizer, *args, **kwargs)

    clip_and_step = StageOptimizer.clip_and_step
    with (
        patch.object(Projections, "full", noted_read),
        patch.object(paired_model, "run_stage", noted_pass),
        patch.object(checkpoint, "_sharded_model", noted_save),
        patch.object(StageOptimizer, "clip_and_step", noted_step),
    ):
        loop.train(config)
    each = len(under_way) // 3
    micro_batch = ["teacher", "student"]
    assert order == ["teacher", *["read"] * each, "student", *micro_batch] * 3 + ["save"]
    for step in (1, 2):
        # Each P waits for its own bucket alone, and none for those of the gains.
        others = len(groups()) - 1
        assert under_way[step * each : (step + 1) * each] == list(range(others, others - each, -1))
        assert others > each


def test_a_composition_waits_for_each_bucket_as_it_needs_it(tiny_llama, tiny_text, tmp_path):
    config = on_layout(make_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "run", steps=3), dist_opt=True)
    config.logging.eval_iters = 0  # so that the last gathers are first read by the checkpoint
    config = with_gather(with_two_micro_batches(config), tmp_path / "run").resolved(2)
    config.parallel.ddp_bucket_size = 100  # so that each matrix has one of its own, and the gains have
    run_ranks(2, note_order_of_gathers, config)
