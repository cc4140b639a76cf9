"""A run asked to stop: the same step on every rank, one checkpoint, and from there on as if nothing had been."""

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_lrc.config import Config
from megatron_lrc.launch.interrupts import ended_by_ctrl_c
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.gpt_models import layers_of
from megatron_lrc.train import loop, stopping
from megatron_lrc.train.start_checks import check
from ranks import PRELOAD, run_ranks
from runs import (
    assert_same_parameters,
    checkpoint_names,
    continued,
    make_config,
    on_layout,
    records,
    saved_in,
    steps_of,
    train,
    without_times,
)
from waiting import wait_until
from worlds import World, training_flags

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "examples/pretrain_lrc.sh")


def train_and_ask(config: Config, moment: str, at: int, rank: int, ask: Callable[[], None]) -> tuple[int, str]:
    """Train; on one rank call `ask` at a moment ("step", "validation", "save", "finish") of a step, "finish" when a
    background save is written. Step reached, last line."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have said nohup, which a run heeds
    handlers = [signal.getsignal(number) for number in stopping.SIGNALS]
    trainer = loop.Trainer(config, check(config, distributed.world_size()), distributed.start(config))
    is_to_ask = dist.get_rank() == rank

    def now(kind: str, step: int) -> None:
        nonlocal is_to_ask
        if is_to_ask and (kind, step) == (moment, at):
            is_to_ask = False
            ask()

    def look(*_: object) -> None:
        if torch.is_grad_enabled():
            now("step", trainer.state.step + 1)
        else:
            now("validation", trainer.state.step)

    def at_moment(kind: str, function: Callable) -> Callable:
        def ask_and_call(*args: object) -> object:
            now(kind, trainer.state.step)
            return function(*args)

        return ask_and_call

    for stage in trainer.run.stages:
        for _, layer in layers_of(stage.student):
            layer.register_forward_pre_hook(look)
    if writer := trainer.saving._writer:
        writer.start = at_moment("save", writer.start)
        writer.finish = at_moment("finish", writer.finish)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        trainer.train()
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == handlers
    assert signal.set_wakeup_fd(-1) == -1
    return trainer.state.step, (said.getvalue().splitlines() or [""])[-1]


def signal_this_process(number: int) -> None:
    os.kill(os.getpid(), number)
    until_noted(number)


def until_noted(number: int) -> None:
    """A thread notes signals; a step of a tiny model may be over before it runs."""
    wait_until(lambda: all(number in watch.received for watch in stopping._watching))


def signal_its_group(number: int) -> None:
    """As torchrun does: what the process has started gets it too."""
    os.killpg(os.getpgid(0), number)
    until_noted(number)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout, rank, ask",
    [
        ({"pp": 2}, 1, partial(signal_this_process, signal.SIGUSR1)),
        ({"dist_opt": True}, 0, partial(signal_its_group, signal.SIGINT)),
    ],
    ids=["SIGUSR1-to-one-stage", "Ctrl-C-to-one-replica-and-its-data-loader"],
)
def test_a_signal_to_one_rank_stops_all_after_the_step_and_the_run_goes_on_bit_for_bit(
    tiny_llama, tiny_text, tmp_path, layout, rank, ask
):
    config = on_layout(make_config(tiny_llama(), tiny_text, tmp_path / "whole", steps=5), **layout)
    config.data.num_workers = 1
    config.checkpoint.save_interval = 2  # by the time of the signal megatron-core has written one
    train(config, 2)
    stopped = saved_in(config, tmp_path / "stopped")
    (step, line), (other_step, _) = run_ranks(2, train_and_ask, stopped.resolved(2), "step", 3, rank, ask)
    number = ask.args[0]
    run = tmp_path / "stopped"
    assert line == f"stopped at step 3 of 5: {signal.Signals(number).name}; go on with --load {run}"
    assert step == other_step == 3 and checkpoint_names(run) == ["iter_0000002", "iter_0000003"]

    train(continued(stopped, steps=5), 2)
    assert without_times(records(run)) == without_times(records(tmp_path / "whole"))
    assert records(run, "validation.jsonl") == records(tmp_path / "whole", "validation.jsonl")
    assert_same_parameters(run, tmp_path / "whole")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "moment, at, saved, validated",
    [
        ("validation", 0, ["iter_0000000"], [0]),
        ("step", 2, ["iter_0000002"], [0]),  # the validation is left out: there may be no time
        ("validation", 2, ["iter_0000002"], [0, 2]),
        ("save", 2, ["iter_0000002"], [0, 2]),
        ("step", 4, ["iter_0000002", "iter_0000004"], [0, 2, 4]),  # the last step: a run that is through
    ],
)
@pytest.mark.parametrize("async_save", [False, True], ids=["at-once", "in-the-background"])
def test_a_signal_is_heard_at_any_time_and_no_step_is_begun_or_saved_twice(
    tiny_llama, tiny_text, tmp_path, moment, at, saved, validated, async_save
):
    config = make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=4)
    config.checkpoint.async_save = async_save
    config.logging.eval_interval = config.checkpoint.save_interval = 2
    ask = partial(signal_this_process, signal.SIGTERM)
    ((step, line),) = run_ranks(1, train_and_ask, config.resolved(1), moment, at, 0, ask)
    assert step == at and checkpoint_names(tmp_path / "run") == saved
    assert line.startswith("stopped at step") == (at < 4)
    assert [line["step"] for line in records(tmp_path / "run", "validation.jsonl")] == validated


@pytest.mark.distributed
def test_a_stop_file_ends_the_run_and_is_removed(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=4)
    ask = partial(Path.touch, tmp_path / "run" / "stop")
    ((step, line),) = run_ranks(1, train_and_ask, config.resolved(1), "step", 2, 0, ask)
    assert (step, line.partition("; ")[0]) == (2, "stopped at step 2 of 4: the file stop")
    assert checkpoint_names(tmp_path / "run") == ["iter_0000002"] and not (tmp_path / "run" / "stop").exists()


@pytest.mark.distributed
def test_the_time_limit_and_the_exit_interval_end_a_run_each_time_it_goes_on(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=5)
    config.logging.eval_iters = 0
    config.training.exit_duration_in_mins = 1e-6
    never = ("never", 0, 0, sys.exit)
    ((step, line),) = run_ranks(1, train_and_ask, config.resolved(1), *never)
    assert step == 1 and line.startswith("stopped at step 1 of 5: --exit-duration-in-mins; go on with --load")
    config = continued(config, steps=5)
    config.training.exit_duration_in_mins, config.training.exit_interval = 60.0, 2
    lines = [run_ranks(1, train_and_ask, config.resolved(1), *never)[0][1] for _ in range(3)]
    reasons = [line.partition(";")[0] for line in lines]
    assert reasons[:2] == [f"stopped at step {step} of 5: --exit-interval" for step in (2, 4)]
    assert lines[2].startswith("saved") and checkpoint_names(tmp_path / "run")[-1] == "iter_0000005"


@pytest.mark.distributed
def test_without_a_run_directory_it_stops_and_says_that_nothing_was_saved(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=4)
    config.checkpoint.save = None
    ask = partial(signal_this_process, signal.SIGHUP)
    ((step, line),) = run_ranks(1, train_and_ask, config.resolved(1), "step", 2, 0, ask)
    assert (step, line) == (2, "stopped at step 2 of 4: SIGHUP; nothing was saved, for want of --save")


def wait_for_a_peer_that_never_comes(folder: str) -> None:
    stopping.COPIES_WITHIN = 1.0
    stopping.SignalWatch().start()
    wait_in_a_library(folder)


def wait_for_ctrl_c(folder: str) -> None:
    """Before a run listens to signals by itself."""
    with open(Path(folder, "said"), "w") as sys.stderr, ended_by_ctrl_c("train"):
        wait_in_a_library(folder)


def wait_in_a_library(folder: str) -> None:
    Path(folder, "ready").touch()
    dist.FileStore(f"{folder}/store", 2).wait(["never"], timedelta(seconds=60))  # type: ignore[attr-defined]  # as in a collective: not in Python


@contextlib.contextmanager
def waiting_process(function: Callable[[str], None], folder: Path) -> Iterator[multiprocessing.process.BaseProcess]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=function, args=(str(folder),))
    process.start()
    wait_until((folder / "ready").exists)
    yield process
    process.join(10)


def send(process: multiprocessing.process.BaseProcess, *numbers: int) -> None:
    assert process.pid is not None
    for number in numbers:
        os.kill(process.pid, number)
        time.sleep(0.1)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "first, again",
    [
        ((signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1), signal.SIGTERM),  # twice within a second, and another one
        ((signal.SIGINT, signal.SIGINT), signal.SIGINT),
        ((signal.SIGINT,), signal.SIGTERM),  # what torchrun makes of a second Ctrl-C
    ],
)
def test_the_same_signal_again_ends_even_a_hanging_process_at_once_but_a_copy_does_not(tmp_path, first, again):
    with waiting_process(wait_for_a_peer_that_never_comes, tmp_path) as process:
        send(process, *first)
        time.sleep(1.2)
        assert process.is_alive()
        send(process, again)
    assert process.exitcode == 128 + again


@pytest.mark.distributed
def test_ctrl_c_before_there_is_anything_to_save_ends_even_a_hanging_process_at_once_in_a_line(tmp_path):
    with waiting_process(wait_for_ctrl_c, tmp_path) as process:
        send(process, signal.SIGINT)
    assert process.exitcode == 130 and (tmp_path / "said").read_text() == "train: interrupted\n"


def end_slowly(rank: int) -> None:
    real = distributed.stop

    def stop() -> None:
        time.sleep(1)
        real()

    distributed.stop = stop
    stopping.COPIES_WITHIN = stopping.KEYS_WITHIN = 0.01


@pytest.mark.distributed
def test_signals_after_the_save_change_nothing(tiny_llama, tiny_text, tmp_path):
    run = tmp_path / "run"
    with World(1, training_flags(tiny_llama(), tiny_text, run), tmp_path / "logs", end_slowly) as world:
        wait_until(lambda: len(steps_of(run)) > 1)
        world.signal(0, signal.SIGTERM)
        wait_until(lambda: "go on with --load" in world.said(0))
        while world.is_running:
            for number in stopping.SIGNALS:
                world.signal(0, number)
            time.sleep(0.01)
        assert world.wait(10) == [0] and "again" not in world.said(0).partition("go on with --load")[2]


def start_a_child_while_watching() -> tuple[bool, bool, int | None]:
    """Of a forked child: whether it lives on after its parent's group was signalled, after SIGUSR1, and how it ends."""
    watch = stopping.SignalWatch()
    watch.start()
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def sleep() -> None:
        ready.set()
        time.sleep(60)

    child = context.Process(target=sleep)
    child.start()
    assert ready.wait(30) and child.pid is not None
    signal_its_group(signal.SIGTERM)
    child.join(0.3)
    survives_the_group = child.is_alive()
    os.kill(child.pid, signal.SIGUSR1)
    child.join(0.3)
    survives_usr1 = child.is_alive()
    child.terminate()
    child.join(10)
    wait_until(lambda: signal.SIGTERM in watch.received)
    assert signal.SIGUSR1 not in watch.received  # the child's is not its parent's
    watch.stop()
    return survives_the_group, survives_usr1, child.exitcode


@pytest.mark.distributed
def test_a_data_loader_outlives_a_signal_to_its_parents_group_and_ends_when_it_is_ended():
    assert run_ranks(1, start_a_child_while_watching) == [(True, True, -signal.SIGTERM)]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_torchrun_ends_in_a_checkpoint(tiny_llama, tiny_text, tmp_path, number):
    run = tmp_path / "run"
    flags = f"--teacher {tiny_llama()} --student-hidden-size 24 --data-path {tiny_text} --split 90,10,0 --save {run} "
    flags += "--seq-length 16 --global-batch-size 8 --train-iters 100000 --log-interval 1 --eval-iters 0 "
    flags += "--pipeline-model-parallel-size 2 --num-workers 1"
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "SLURM_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(launch)}
    settings = {**clean, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GPUS_PER_NODE": "2"}
    with open(tmp_path / "output", "w") as output:
        command = ["bash", SCRIPT, *flags.split()]
        torchrun = subprocess.Popen(command, env=settings, stdout=output, stderr=output, start_new_session=True)
        try:
            wait_until(lambda: torchrun.poll() is not None or len(steps_of(run)) > 1)
            if number == signal.SIGINT:
                os.killpg(torchrun.pid, number)  # as a terminal does
            else:
                torchrun.send_signal(number)
            torchrun.wait(60)
        finally:
            torchrun.kill()
            if run.exists():
                (run / "stop").touch()  # for training processes that a failing torchrun has left behind
    (checkpoint,) = checkpoint_names(run)
    step = int(checkpoint.removeprefix("iter_"))
    said = (tmp_path / "output").read_text()
    assert f"stopped at step {step} of 100000: {number.name}; go on with --load {run}" in said
    assert steps_of(run)[-1] == step and "forcefully" not in said
