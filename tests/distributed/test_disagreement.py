"""Ranks that were not started alike do not train: each ends with the user's error, which names what differs where."""

import os
import shutil
import socket
import sys
from functools import partial
from pathlib import Path

import pytest

import megatron_lrc
from checkpoints import write_run
from megatron_lrc.hf.families import describe_teacher
from runs import checkpoint_names
from students import random_student
from worlds import LaunchedWorld, World, training_flags

HOST = socket.gethostname()


def flip(path: Path, place: int) -> None:
    """The lowest bit of a byte; a negative place counts from the end."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def copy_data(prefix: str, folder: Path) -> str:
    folder.mkdir()
    for suffix in (".idx", ".bin"):
        shutil.copy(prefix + suffix, folder / f"text{suffix}")
    return str(folder / "text")


def copy_code(folder: Path) -> Path:
    """The package, of which one comment is another."""
    package = folder / "megatron_lrc"
    shutil.copytree(Path(megatron_lrc.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    with open(package / "train/step.py", "a") as file:
        file.write("# changed\n")
    return package


def write_checkpoint(run: Path, teacher: str) -> Path:
    """Step 3 of a run with `training_flags`."""
    description = describe_teacher(teacher)
    return write_run(run, description, *random_student(description, 24, has_lm_head=True))


def run_code_of(rank: int, *, package: Path) -> None:
    if rank == 1:
        megatron_lrc.__file__ = str(package / "__init__.py")


def refusal(world: World, rank: int) -> str:
    """The one line of a user's error."""
    said = world.said(rank)
    assert "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.distributed
def test_every_difference_is_named_on_every_rank_and_nobody_trains(tiny_llama, tiny_text, tmp_path):
    teacher, run = tiny_llama(), tmp_path / "run"
    other = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    flip(other / "model.safetensors", -1)
    data = copy_data(tiny_text, tmp_path / "data")
    flip(Path(data + ".bin"), 0)
    write_checkpoint(run, teacher)
    flags = training_flags(teacher, tiny_text, run, "--load", "auto")
    own = ["--lr", "0.5", "--bf16", "--teacher", str(other), "--data-path", data, "--save", str(tmp_path / "other-run")]
    code = partial(run_code_of, package=copy_code(tmp_path / "code"))
    with World(2, flags, tmp_path / "logs", code, own_flags={1: own}) as world:
        assert world.wait(60) == [2, 2], world.said(0)
        assert refusal(world, 0) == refusal(world, 1)
        line = refusal(world, 0)
    assert f"--lr is 0.0001 on rank 0 ({HOST}) but 0.5 on rank 1 ({HOST});" in line
    assert f"--bf16 is False on rank 0 ({HOST}) but True on rank 1 ({HOST});" in line
    assert "what lies at --teacher is " in line and "dataset 1 of --data-path is .idx " in line
    assert "the checkpoint to go on from is iter_0000003 " in line and f"but none on rank 1 ({HOST})" in line
    assert "megatron_lrc/train/step.py is " in line and "more differences" not in line
    assert checkpoint_names(run) == ["iter_0000003"] and not (tmp_path / "other-run").exists()


@pytest.mark.distributed
def test_ranks_train_whose_files_lie_elsewhere(tiny_llama, tiny_text, tmp_path):
    """Copies of teacher and data, the run directory by another path, and what concerns one rank alone."""
    flags = training_flags(tiny_llama(), tiny_text, tmp_path / "run", "--train-iters", "1")
    flags += ["--data-cache-path", str(tmp_path / "cache")]
    own = ["--teacher", shutil.copytree(tiny_llama(), tmp_path / "teacher")]
    own += ["--data-path", copy_data(tiny_text, tmp_path / "data"), "--num-workers", "1", "--peak-tflops", "5"]
    (tmp_path / "mount").symlink_to(tmp_path)
    own += ["--save", str(tmp_path / "mount/run"), "--data-cache-path", str(tmp_path / "mount/cache")]
    with World(2, flags, tmp_path / "logs", own_flags={1: [str(flag) for flag in own]}) as world:
        assert world.wait(60) == [0, 0], [world.said(rank) for rank in range(2)]
    assert checkpoint_names(tmp_path / "run") == ["iter_0000001"]


@pytest.mark.distributed
def test_a_rank_that_cannot_start_ends_the_others_in_its_words(tiny_llama, tiny_text, tmp_path):
    flags = training_flags(tiny_llama(), tiny_text, tmp_path / "run")
    with World(2, flags, tmp_path / "logs", own_flags={1: ["--data-path", "nowhere"]}) as world:
        assert world.wait(30) == [2, 2], world.said(0)
        assert f"error: rank 1 ({HOST}) cannot start: There is no " in refusal(world, 0)


def end_at_once(rank: int) -> None:
    if rank == 1:
        os._exit(3)


@pytest.mark.distributed
def test_a_rank_that_never_comes_is_named_in_one_line(tiny_llama, tiny_text, tmp_path):
    flags = training_flags(tiny_llama(), tiny_text, tmp_path / "run", "--distributed-timeout-minutes", "0.04")
    with World(2, flags, tmp_path / "logs", end_at_once) as world:
        assert world.wait(30) == [1, 3], world.said(0)
        assert refusal(world, 0).startswith("error: Rank 1 did not come within 2.4 s of rank 0 ")


@pytest.mark.distributed
def test_ranks_that_fall_back_to_different_checkpoints_stop(tiny_llama, tiny_text, tmp_path):
    """The newest, which all see, is damaged inside; before it each sees another one."""
    runs = [tmp_path / "run", tmp_path / "other"]
    for number, run in enumerate(runs, start=1):
        path = write_checkpoint(run, tiny_llama())
        shutil.copytree(path, run / f"iter_000000{number}")
    shutil.rmtree(runs[1] / "iter_0000003")
    flip(next((runs[0] / "iter_0000003").glob("*.distcp")), -100)
    shutil.copytree(runs[0] / "iter_0000003", runs[1] / "iter_0000003")
    flags = training_flags(tiny_llama(), tiny_text, runs[0], "--load", "auto")
    with World(2, flags, tmp_path / "logs", own_flags={1: ["--save", str(runs[1])]}) as world:
        assert world.wait(60) == [2, 2], world.said(0)
        assert "the checkpoint to go on from is iter_0000001 " in world.said(0)


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_reports_a_node_that_runs_other_code(tiny_llama, tiny_text, tmp_path):
    package = copy_code(tmp_path / "code")
    python = tmp_path / "python"
    script = f'if [ "$RANK" = 1 ]; then cd {package.parent}; export PYTHONPATH=$PWD; fi\nexec {sys.executable} "$@"\n'
    python.write_text(f"#!/bin/sh\n{script}")
    python.chmod(0o755)
    flags = training_flags(tiny_llama(), tiny_text, tmp_path / "run")
    with LaunchedWorld(2, flags, tmp_path / "log", PYTHON_EXEC=str(python), MAX_RESTARTS="0") as world:
        assert world.wait(100) == [1], world.said()
        said = world.said()
    assert said.count("error: The ranks were not started alike: megatron_lrc/train/step.py is ") == 1, said
    assert "exitcode  : 2" in said
