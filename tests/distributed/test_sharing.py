"""--share-compose: a run is what it is without; who shares with whom, and when they exchange what."""

import contextlib
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_lrc.clone.projections import Projections
from megatron_lrc.clone.sharing import BEHIND, Sharing
from megatron_lrc.config import Config, RunStopped
from megatron_lrc.mcore import distributed
from megatron_lrc.methods.lrc import paired_model
from megatron_lrc.train import loop
from megatron_lrc.train.start_checks import check
from megatron_lrc.train.step import Run
from method_runs import opened_config
from ranks import run_ranks
from runs import continued, for_steps, make_config, records, train

pytestmark = pytest.mark.distributed


def with_parallel(config: Config, run: Path | None = None, **flags: Any) -> Config:
    checkpoint = replace(config.checkpoint, save=run and str(run))
    return replace(config, parallel=replace(config.parallel, **flags), checkpoint=checkpoint)


def shared(config: Config, run: Path | None = None, *, is_overlapped: bool = False) -> Config:
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True, "use_distributed_optimizer": True}
    return with_parallel(config, run, share_compose=True, **overlap if is_overlapped else {})


def lines_of_training(config: Config) -> list[str]:
    """On a rank. Read here: ranks write where the process that all are forked from was started to write."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        loop.train(config)
    return said.getvalue().splitlines()


@pytest.mark.slow
def test_a_run_may_begin_to_share_and_cease_to(tiny_llama, tiny_text, tmp_path):
    """In bf16, with everything overlapped, past the opening of the MLPs at step 2. Here only what a missing part of a
    gradient would change; `test_gradients.py` has every digit."""
    config = opened_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "plain", "mlp", steps=4)
    config.training.bf16, config.logging.eval_iters = True, 0
    train(config, 2)
    run = tmp_path / "run"
    for part, is_shared in (
        (for_steps(shared(config, run, is_overlapped=True), 1), True),
        (continued(with_parallel(config, run), steps=2), False),
        (continued(shared(config, run, is_overlapped=True), steps=4), True),
    ):
        lines = run_ranks(2, lines_of_training, part.resolved(2))[0]
        assert ("compose and pull back are divided among the 2 replicas of a node" in lines) == is_shared
    for line, other in zip(records(run), records(tmp_path / "plain"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-3)
        for name, norm in other["grad_norm_by_group"].items():
            assert line["grad_norm_by_group"][name] == (norm and pytest.approx(norm, rel=0.02)), name


# ----------------------------------------------------------------------------------------------------------- in order


def note_order(config: Config) -> list[str]:
    """What a rank does in its second step, of two micro-batches: begins a sum, adds to dP, ends its backward passes,
    awaits matrices, runs a model."""
    order: list[str] = []
    begin_sum, pull_back_one, await_matrices = Sharing.begin_sum, Projections.pull_back_one, Sharing.await_matrices
    run_stage, pull_back = paired_model.run_stage, Run.pull_back

    def noted_sum(sharing: Sharing, matrix: Any, gradient: Any) -> None:
        if matrix not in sharing._sums:
            order.append("sum")
        begin_sum(sharing, matrix, gradient)

    def noted_pull_back(projections: Projections, weight: Any) -> None:
        order.append("pull back")
        pull_back_one(projections, weight)

    def noted_wait(sharing: Sharing, among: Any = None) -> None:
        arriving = len(sharing._arriving)
        await_matrices(sharing, among)
        if len(sharing._arriving) < arriving:
            order.append(f"waited, {len(sharing._arriving)} left")

    def noted_pass(model: Any, *args: Any) -> Any:
        order.append("student" if model.config.hidden_size == config.model.student_hidden_size else "teacher")
        return run_stage(model, *args)

    def noted_end(run: Run) -> None:
        order.append("end of backward")
        pull_back(run)

    with (
        patch.object(Sharing, "begin_sum", noted_sum),
        patch.object(Projections, "pull_back_one", noted_pull_back),
        patch.object(Sharing, "await_matrices", noted_wait),
        patch.object(paired_model, "run_stage", noted_pass),
        patch.object(Run, "pull_back", noted_end),
    ):
        loop.train(config)
    ends = [place for place, what in enumerate(order) if what == "teacher"]
    return order[ends[2] :]


@pytest.mark.parametrize("is_overlapped", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_matrices_arrive_as_they_are_read_and_sums_run_beside_backward(tiny_llama, tiny_text, tmp_path, is_overlapped):
    """Two layers of four matrices each, and a head of its own."""
    config = make_config(tiny_llama(is_tied=False), tiny_text, tmp_path, steps=2)
    config.logging.eval_iters = 0
    orders = run_ranks(2, note_order, shared(config, is_overlapped=is_overlapped).resolved(2))
    assert orders[0] == orders[1], "or some ranks would wait for others that wait for them"
    order = orders[0]
    passes = ["teacher", "student", "waited, 5 left", "waited, 1 left", "waited, 0 left", "teacher", "student"]
    assert order[: len(passes)] == passes
    backward, end = order[len(passes) :], order.index("end of backward") - len(passes)
    assert backward.count("sum") == 2 * 4 + 1 and backward.count("pull back") == 2 * 7 + 2
    if is_overlapped:
        assert "sum" not in backward[end:]
        assert backward[end + 1 :].count("pull back") == BEHIND
        assert backward[:6] == [*["sum"] * 5, "pull back"]  # of the head and a layer, then the head
    else:
        assert end == 0 and backward[1:] == ["sum"] * 9 + ["pull back"] * 16


# ------------------------------------------------------------------------------------------------------------- groups


CASES = [  # tensor parallel ranks, the node of each rank, with whom each shares
    (1, "0011", [[0, 1], [0, 1], [2, 3], [2, 3]]),
    (1, "0001", [[0, 1, 2], [0, 1, 2], [0, 1, 2], []]),
    (2, "0011", [[], [], [], []]),  # one replica on each node
    (2, "0001", [[], [], [], []]),  # rank 0 has a replica beside it, but what it makes takes rank 1 too
    (2, "0101", [[0, 2], [1, 3], [0, 2], [1, 3]]),  # tensor parallelism over nodes
]


def list_sharing() -> list[list[int]]:
    """On a rank: with whom it shares, in each case."""
    found = []
    for tp, nodes, _ in CASES:
        os.environ["GROUP_RANK"] = nodes[dist.get_rank()]
        config = Config()
        config.parallel.tensor_model_parallel_size, config.parallel.share_compose = tp, True
        groups = distributed.start(config)
        found.append(dist.get_process_group_ranks(groups.sharing) if groups.sharing else [])
        says_nothing = "--share-compose is off: this node has one replica" in distributed.describe_sharing(groups)
        assert says_nothing == (groups.sharing is None)
        parallel_state.destroy_model_parallel()
    return found


def test_replicas_share_whose_ranks_are_on_the_same_nodes():
    by_rank = run_ranks(4, list_sharing)
    for case, (tp, nodes, expected) in enumerate(CASES):
        assert [found[case] for found in by_rank] == expected, (tp, nodes)


# ------------------------------------------------------------------------------------------------------------- faults


def train_with_one_bad_replica(config: Config) -> str:
    trainer = loop.Trainer(config, check(config, distributed.world_size()), distributed.start(config))
    if dist.get_rank() == 1:
        for weight in trainer.run.stages[0].cloned_weights:
            if weight.projection == "layers.1.down":
                weight.student.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(RunStopped) as stopped:
        trainer.train()
    return str(stopped.value)


def test_a_fault_of_one_replica_skips_the_step_on_all(tiny_llama, tiny_text, tmp_path):
    config = shared(make_config(tiny_llama(), tiny_text, tmp_path, steps=2))
    config.training.max_skipped_steps = 1
    texts = run_ranks(2, train_with_one_bad_replica, config.resolved(2))
    assert texts[0] == texts[1] and "the gradient of layer 1, term down, is not finite on rank" in texts[0]
    assert "or on another of its node: --share-compose has summed theirs" in texts[0]
