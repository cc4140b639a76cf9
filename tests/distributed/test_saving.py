"""Saving of real runs: in the background as at once, shared by ranks, when it fails, and what is kept."""

import contextlib
import errno
import io
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

import slow_writers
from disturbed_training import train_with_slow_writers
from megatron_lrc.checkpoints import background_writer
from megatron_lrc.checkpoints.run_directory import (
    checkpoint_path,
    checkpoints,
    find_changed,
    find_missing,
    step_of,
)
from megatron_lrc.config import Config
from megatron_lrc.mcore import checkpoint_writer
from megatron_lrc.train import loop
from megatron_lrc.train.start_checks import check
from ranks import run_ranks
from runs import (
    assert_same_parameters,
    continued,
    make_config,
    make_trainer,
    on_layout,
    records,
    saving,
    train,
    without_times,
)
from small_disks import fill_disk, small_disk_at

pytestmark = pytest.mark.distributed


def steps_on_disk(run: Path) -> list[int]:
    return sorted(step_of(path) for path in checkpoints(run))


# ------------------------------------------------------------------------------------------------ in the background


@pytest.mark.parametrize(
    "ranks, layout, bf16",
    [
        pytest.param(1, {}, False, id="one"),
        pytest.param(2, {"tp": 2}, True, id="TP2-bf16", marks=pytest.mark.slow),
        pytest.param(2, {"dist_opt": True}, False, id="DP2-distributed-optimizer"),
    ],
)
def test_what_is_written_in_the_background_is_the_state_of_its_step(
    tiny_llama, tiny_text, tmp_path, ranks, layout, bf16
):
    config = on_layout(make_config(tiny_llama(is_tied=True), tiny_text, tmp_path / "sync", steps=6), **layout)
    config.training.bf16 = bf16
    config.checkpoint.save_interval = 3
    train(config, ranks)
    in_background = saving(config, save=str(tmp_path / "async"), async_save=True)
    run_ranks(ranks, train_with_slow_writers, in_background.resolved(ranks))
    assert without_times(records(tmp_path / "async")) == without_times(records(tmp_path / "sync"))
    for step in (3, 6):
        assert_same_parameters(checkpoint_path(tmp_path / "async", step), checkpoint_path(tmp_path / "sync", step))
    # Optimizer state too: going on from step 3 gives the same end, bit for bit.
    moved = saving(config, save=str(tmp_path / "moved"), load=str(checkpoint_path(tmp_path / "async", 3)))
    train(moved, ranks)
    assert_same_parameters(tmp_path / "moved", tmp_path / "sync")


def test_training_goes_on_while_a_checkpoint_is_written(tiny_llama, tiny_text, tmp_path):
    """And the checkpoint appears as soon as it is written, not when the next one is due."""
    config = make_config(tiny_llama(), tiny_text, tmp_path, steps=40)
    config.checkpoint.save_interval, config.checkpoint.async_save = 2, True
    config.training.train_iters = 3
    seen = run_ranks(1, watch_the_second_step, config.resolved(1))[0]
    assert seen == [(3, [], True), (3, [2, 3], False)]


def watch_the_second_step(config: Config) -> list[tuple[int, list[int], bool]]:
    """(step, checkpoints on disk, whether one is being written), after the last step and at the end."""
    seen: list[tuple[int, list[int], bool]] = []
    slow_writers.use("slow_writers:serve_slowly")
    trainer = make_trainer(config)
    look = trainer._look_at

    def look_and_watch(report: object) -> None:
        look(report)
        if trainer.state.step == 3:
            run = Path(config.checkpoint.save or "")
            seen.append((3, steps_on_disk(run), trainer.saving._writer.is_writing))

    trainer._look_at = look_and_watch
    trainer.train()
    seen.append((3, steps_on_disk(Path(config.checkpoint.save or "")), trainer.saving._writer.is_writing))
    return seen


def test_a_writer_that_dies_fails_its_save_and_not_the_run(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, tmp_path, steps=5)
    config.checkpoint.save_interval, config.checkpoint.async_save = 2, True
    lines = run_ranks(1, train_with_a_dying_writer, config.resolved(1))[0]
    assert steps_on_disk(tmp_path) == [4, 5]
    assert [line for line in lines if "could not be saved" in line] == [
        "warning: step 2 could not be saved: the process that wrote it died, perhaps for want of memory; "
        "earlier checkpoints are untouched; the run goes on, and tries again after the next step"
    ]
    assert not list(tmp_path.glob("*.partial-*"))


def train_with_a_dying_writer(config: Config) -> list[str]:
    slow_writers.use("slow_writers:serve_and_die_at_step_2")
    trainer = make_trainer(config)
    lines: list[str] = []
    trainer.saving._say = lines.append
    trainer.train()
    return lines


def writers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "background_writer" in " ".join(child.cmdline())]


def train_and_kill_idle_writers(config: Config) -> list[int]:
    """PIDs of the writer at each step; it is killed at step 2, when it has nothing to do."""
    slow_writers.use(background_writer.ENTRY)
    trainer, pids = make_trainer(config), []
    look = trainer._look_at

    def look_and_kill(report: object) -> None:
        look(report)
        trainer.saving.finish()
        pids.extend(writer.pid for writer in writers())
        if trainer.state.step == 2:
            process = trainer.saving._writer._background._process
            process.kill()
            process.wait()

    trainer._look_at = look_and_kill
    trainer.train()
    assert not writers(), "it has been ended with the run"
    return pids


def test_a_writer_that_died_between_saves_is_started_again(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, tmp_path / "killed", steps=4)
    config.checkpoint.save_interval, config.checkpoint.async_save = 1, True
    config.data.num_workers = 1  # a forked process that holds copies of this one's connections
    first, second, *others = run_ranks(1, train_and_kill_idle_writers, config.resolved(1))[0]
    assert first == second and second not in others and len(set(others)) == 1
    assert steps_on_disk(tmp_path / "killed") == [1, 2, 3, 4]
    config.data.num_workers = 0
    train(saving(config, save=str(tmp_path / "sync"), async_save=False))
    for step in (1, 2, 3, 4):
        files, others = (
            {path.name: path.read_bytes() for path in checkpoint_path(tmp_path / name, step).glob("*.distcp")}
            for name in ("killed", "sync")
        )
        assert files and files == others, "the same bytes as those of a save at once"


def train_without_shared_memory(config: Config) -> list[str]:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    slow_writers.use(background_writer.ENTRY)
    background_writer.BackgroundWriter._memory_of = refuse
    trainer, lines = make_trainer(config), []
    trainer.saving._say = lines.append
    trainer.train()
    return lines


def test_without_memory_for_a_copy_it_is_written_at_once(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, tmp_path, steps=2)
    config.checkpoint.save_interval, config.checkpoint.async_save = 1, True
    lines = run_ranks(1, train_without_shared_memory, config.resolved(1))[0]
    assert steps_on_disk(tmp_path) == [1, 2]
    assert not [line for line in lines if "warning" in line]


def start_a_writer_and_be_killed(pid_file: str) -> None:
    slow_writers.use("slow_writers:serve_slowly")
    writer = background_writer.BackgroundWriter()
    assert writer.start([(pid_file + ".written", "name", ([], [(None, torch.zeros(3))]))])
    Path(pid_file).write_text(str(writer._process.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_writer_ends_with_its_rank_however_that_ends(tmp_path):
    pid_file = tmp_path / "pid"
    process = multiprocessing.get_context("spawn").Process(target=start_a_writer_and_be_killed, args=(str(pid_file),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(pid_file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not Path(f"{pid_file}.written").exists()


def test_a_run_does_not_wait_at_its_end_for_a_writer_that_is_not_ready(monkeypatch):
    monkeypatch.setattr(background_writer, "ENTRY", "slow_writers:serve_after_a_minute")
    writer = background_writer.BackgroundWriter()
    process, start = writer._process, time.monotonic()
    writer.close()
    assert time.monotonic() - start < 30
    assert process.returncode == -signal.SIGKILL


def test_ranks_that_hold_the_same_share_the_writing(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, tmp_path, steps=1)
    train(config, 2)
    path = checkpoint_path(tmp_path, 1)
    first, second = (sum(file.stat().st_size for file in path.glob(f"__{rank}_*.distcp")) for rank in (0, 1))
    assert 0.8 < first / second < 1.25


def test_ranks_in_other_working_directories_write_into_that_of_rank_0(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, Path("run"), steps=1)
    run_ranks(2, train_in_a_directory_of_its_own, config.resolved(2), tmp_path)
    path = checkpoint_path(tmp_path / "rank0/run", 1)
    assert {file.name[:4] for file in path.glob("*.distcp")} == {"__0_", "__1_"}
    assert find_missing(path) is None and find_changed(path) is None
    assert not list((tmp_path / "rank1").rglob("*.distcp"))


def train_in_a_directory_of_its_own(config: Config, parent: Path) -> None:
    folder = parent / f"rank{os.environ['RANK']}"
    folder.mkdir()
    os.chdir(folder)
    loop.train(config)


# ------------------------------------------------------------------------------------------------ failing saves


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_the_older_ones(
    tiny_llama, tiny_text, tmp_path, async_save
):
    config = on_layout(make_config(tiny_llama(), tiny_text, tmp_path, steps=4), pp=2)
    config.checkpoint.save_interval, config.checkpoint.async_save = 2, async_save
    messages = run_ranks(2, train_with_a_full_disk_from_step_three, config.resolved(2))
    assert messages[0] == messages[1]
    assert messages[0].startswith("step 4 could not be saved: File too large")
    assert steps_on_disk(tmp_path) == [2]
    path = checkpoint_path(tmp_path, 2)
    assert find_missing(path) is None and find_changed(path) is None
    assert not list(tmp_path.glob("*.partial-*"))


def train_with_a_full_disk_from_step_three(config: Config) -> str:
    """On the last rank: no file may grow beyond 4 KB any more. What the run has to say in the end."""
    slow_writers.use(background_writer.ENTRY)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checked = check(config, 2)
    trainer = loop.Trainer(checked.config, checked, loop.distributed.start(config))
    look = trainer._look_at

    def look_and_fill(report: object) -> None:
        look(report)
        trainer.saving.finish()
        if trainer.state.step == 3 and trainer.groups.is_last_rank:
            for pid in (os.getpid(), *(writer.pid for writer in writers())):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    trainer._look_at = look_and_fill
    try:
        trainer.train()
    except loop.RunStopped as error:
        return str(error)
    return "done"


def test_a_run_goes_on_over_a_full_disk_and_saves_when_there_is_room_again(tiny_llama, tiny_text, tmp_path):
    """Also one that is started on it. Each look at a step comes before its record and its save."""
    with small_disk_at(tmp_path / "disk", size="16m") as disk:
        config = make_config(tiny_llama(), tiny_text, disk / "run", steps=8)
        config.checkpoint.save_interval = 3
        said = run_ranks(1, train_on_a_disk_that_is_full_meanwhile, config.resolved(1), 2, 5)[0]
        assert steps_on_disk(disk / "run") == [5, 6, 8]
        fill_disk(disk, 0)
        config = continued(config, steps=11)
        said += run_ranks(1, train_on_a_disk_that_is_full_meanwhile, config.resolved(1), None, 10)[0]
        assert steps_on_disk(disk / "run") == [5, 6, 8, 10, 11]
        assert [record["step"] for record in records(disk / "run")] == list(range(1, 12))
        assert len(records(disk / "run", "starts.jsonl")) == 2
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    first = "step {} could not be saved: it takes 0.00 GB and {} has 0.00 GB free"
    assert sum(first.format(3, disk / "run") in line for line in warnings) == 1
    assert sum(first.format(9, disk / "run") in line for line in warnings) == 1
    assert sum("cannot be written (No space left on device): the run goes on" in line for line in warnings) == 2
    assert len(warnings) == 4


def train_on_a_disk_that_is_full_meanwhile(config: Config, full_at: int | None, free_at: int) -> str:
    """From one step to another. What was printed."""
    run = Path(config.checkpoint.save or "")
    trainer = make_trainer(config)
    look = trainer._look_at

    def look_and_fill(report: object) -> None:
        look(report)
        if trainer.state.step == full_at:
            fill_disk(run.parent, 0)
        if trainer.state.step == free_at:
            (run.parent / "ballast").unlink()

    trainer._look_at = look_and_fill
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer.train()
    return printed.getvalue()


def test_a_checkpoint_for_which_there_is_no_room_is_not_begun(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, tmp_path, steps=1)
    message = run_ranks(1, train_without_room, config.resolved(1))[0]
    assert "0.00 GB free; make room, or have older checkpoints removed with --keep-last" in message
    assert not list(tmp_path.glob("iter_*"))


def train_without_room(config: Config) -> str:
    usage = checkpoint_writer.shutil.disk_usage
    checkpoint_writer.shutil.disk_usage = lambda path: usage(path)._replace(free=1000)  # type: ignore[assignment]
    try:
        loop.train(config)
    except loop.RunStopped as error:
        return str(error)
    return "done"


def test_old_checkpoints_go_when_a_new_one_is_there(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, tmp_path, steps=7)
    train(saving(config, save_interval=1, keep_last=2, save_retain_interval=3))
    assert steps_on_disk(tmp_path) == [3, 6, 7]
