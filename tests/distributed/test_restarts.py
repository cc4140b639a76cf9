"""torchrun starts a run again whose processes fail: it goes on by itself, from where it was saved."""

import os
import signal
from pathlib import Path

import pytest

from runs import assert_same_parameters, checkpoint_names, records, steps_of, without_times
from waiting import wait_until
from worlds import LaunchedWorld, World, training_flags

STEPS = 40
PP2 = ["--pipeline-model-parallel-size", "2"]


def wait_for_step(run: Path, step: int, world: LaunchedWorld) -> None:
    wait_until(lambda: not world.is_running or (steps_of(run) or [0])[-1] >= step)
    assert world.is_running, world.said()


def undisturbed(folder: Path, flags: list[str]) -> Path:
    """The run directory of the same run, to which nothing happens."""
    place = flags.index("--save") + 1
    with World(2, [*flags[:place], str(folder / "whole"), *flags[place + 1 :]], folder / "logs") as world:
        assert world.wait(100) == [0, 0], world.said(0)
    return folder / "whole"


def assert_same_run(one: Path, two: Path) -> None:
    assert [line["step"] for line in records(one)] == list(range(1, STEPS + 1))
    assert without_times(records(one)) == without_times(records(two))
    assert_same_parameters(one, two)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_whose_ranks_are_killed_is_started_again_and_comes_out_the_same(tiny_llama, tiny_text, tmp_path):
    run = tmp_path / "run"
    flags = training_flags(tiny_llama(), tiny_text, run, "--train-iters", str(STEPS), "--load", "auto", *PP2)
    flags += ["--save-interval", "4", "--async-save"]
    with LaunchedWorld(2, flags, tmp_path) as world:
        for number, (victim, step) in enumerate([(1, 6), (0, 20)], start=1):
            wait_for_step(run, step, world)
            world.signal(victim, signal.SIGKILL)
            wait_until(lambda number=number: not world.is_running or len(records(run, "starts.jsonl")) > number)
        assert world.wait(100) == [0], world.said()
    starts = [line["step"] for line in records(run, "starts.jsonl")]
    assert len(starts) == 3 and starts[0] == 0 and 4 <= starts[1] < starts[2] and starts[2] >= 16
    assert_same_run(run, undisturbed(tmp_path, flags))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_launchers_as_on_two_nodes_both_start_again_also_without_load_auto(tiny_llama, tiny_text, tmp_path):
    run = tmp_path / "run"
    flags = [*training_flags(tiny_llama(), tiny_text, run, "--train-iters", str(STEPS), *PP2), "--save-interval", "4"]
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "MAX_RESTARTS": "1"}
    with (
        LaunchedWorld(1, flags, tmp_path / "node0", **nodes, NODE_RANK="0") as first,
        LaunchedWorld(1, flags, tmp_path / "node1", **nodes, NODE_RANK="1") as second,
    ):
        wait_for_step(run, 6, first)
        second.signal(1, signal.SIGKILL)
        assert [*first.wait(100), *second.wait(100)] == [0, 0], first.said()
        assert "died; with it ends rank 0" in first.said()
    assert [line["step"] >= 4 for line in records(run, "starts.jsonl")] == [False, True]
    assert_same_run(run, undisturbed(tmp_path, flags))


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_whose_torchrun_is_killed_save_and_end(tiny_llama, tiny_text, tmp_path):
    run = tmp_path / "run"
    with LaunchedWorld(2, training_flags(tiny_llama(), tiny_text, run, *PP2), tmp_path) as world:
        wait_for_step(run, 2, world)
        assert len(world.ranks()) == 2
        os.kill(world.launcher.pid, signal.SIGKILL)
        world.wait(10)
        wait_until(lambda: not world.living(), 20)
        assert f"SIGTERM; go on with --load {run}" in world.said()
    assert len(checkpoint_names(run)) == 1
