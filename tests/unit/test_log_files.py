"""A run's records on a disk that is full, or read-only, for a while: they come late, in order, and whole."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from command_line import ROOT
from megatron_lrc import console
from megatron_lrc.config import Config, ModelShape
from megatron_lrc.train import log_files
from megatron_lrc.train.metrics import RunLog
from megatron_lrc.train.throughput import Throughput
from small_disks import PAGE, fill_disk, remount

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=4,
    vocab_size=32,
    max_position_embeddings=64,
    norm_epsilon=1e-6,
    is_tied=False,
)


def open_log(run: Path, *, resume_at: int = 0) -> RunLog:
    config = Config()
    config.checkpoint.save, config.training.global_batch_size, config.training.train_iters = str(run), 8, 1000
    throughput = Throughput(config, SHAPE, SHAPE, world_size=1, peak=None)
    return RunLog(config, throughput, resume_at=resume_at, checkpoint=None, weights=None, world_size=1)


def log_steps(log: RunLog, steps: range) -> None:
    for step in steps:
        losses = {"loss": 1.0 / step, "lm_loss": 2.0, "kl_loss": 0.0, "clone_loss": 0.0, "grad_norm": 1.0}
        memory = {"peak": 1.0, "now": 1.0}
        log.step({"step": step, "tokens": 8 * step, "step_seconds": 1.0, "memory_gib": memory, **losses})
    log.validation({"step": steps[-1], "tokens": 8, "loss": 1.0, "lm_loss": 2.0, "kl_loss": 0.0, "clone_loss": 0.0})


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def check_records(run: Path, steps: range, *, starts: int = 1) -> None:
    """All of them, once and in order, wherever they are shown."""
    assert steps_in(run / "metrics.jsonl") == list(steps)
    assert len(steps_in(run / "starts.jsonl")) == starts
    assert "global_batch_size: 8" in (run / "config.yaml").read_text()
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(steps)
    assert not list(run.glob(".*"))


def warnings_in(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("free", [0, PAGE, 3 * PAGE], ids=["none", "one page", "three pages"])
def test_a_full_disk_costs_one_warning_and_no_record(small_disk, capsys, free):
    """free: bytes there when the run starts, so that it is full in the middle of a file."""
    ballast = fill_disk(small_disk, free)
    log = open_log(small_disk / "run")
    log_steps(log, range(1, 41))
    (warning,) = warnings_in(capsys.readouterr().out)
    assert f"{small_disk}/run" in warning and "cannot be written (No space left on device): the run goes on" in warning
    ballast.unlink()
    log_steps(log, range(41, 43))
    assert "the run's records can be written again, and what waited is; nothing is lost" in capsys.readouterr().out
    log.close()
    check_records(small_disk / "run", range(1, 43))
    assert steps_in(small_disk / "run/validation.jsonl") == [40, 42]


def test_a_run_starts_again_on_a_full_disk_and_forgets_what_it_does_anew(small_disk, capsys):
    log = open_log(small_disk / "run")
    log_steps(log, range(1, 11))
    log.close()
    ballast = fill_disk(small_disk, 0)
    time.sleep(1)  # TensorBoard reads a run's files in the order of the seconds in which they were begun
    log = open_log(small_disk / "run", resume_at=4)
    assert steps_in(small_disk / "run/metrics.jsonl") == [1, 2, 3, 4]
    log_steps(log, range(5, 48))
    ballast.unlink()
    log_steps(log, range(48, 52))
    log.close()
    check_records(small_disk / "run", range(1, 52), starts=2)
    assert len(warnings_in(capsys.readouterr().out)) == 1


def test_a_run_directory_that_becomes_read_only_costs_one_warning_and_no_record(small_disk, capsys):
    log = open_log(small_disk / "run")
    log_steps(log, range(1, 4))
    remount(small_disk, "ro")
    log_steps(log, range(4, 6))
    log = open_log(small_disk / "run", resume_at=2)
    log_steps(log, range(3, 6))
    remount(small_disk, "rw")
    log_steps(log, range(6, 8))
    log.close()
    assert steps_in(small_disk / "run/metrics.jsonl") == list(range(1, 8))
    warnings = warnings_in(capsys.readouterr().out)
    assert len(warnings) == 2 and all("(Read-only file system)" in warning for warning in warnings)


def test_what_is_beyond_the_memory_for_it_is_lost_and_counted(small_disk, capsys, monkeypatch):
    monkeypatch.setattr(log_files, "MOST_WAITING", 3)
    files, path = log_files.LogFiles(), small_disk / "file"
    ballast = fill_disk(small_disk, 0)
    for number in range(5):
        files.append(path, b"%d\n" % number)
    ballast.unlink()
    files.append(small_disk / "other", b"\n")
    assert path.read_bytes() == b"0\n1\n2\n"
    assert "what waited is; 2 lines are lost" in capsys.readouterr().out
    fill_disk(small_disk, 0)
    files.append(path, b"9" * PAGE)
    files.close()
    assert "1 lines of its records could not be written" in warnings_in(capsys.readouterr().out)[-1]


def test_a_console_on_a_full_disk_ends_no_process():
    program = "from megatron_lrc import console; console.say('a'); console.complain('b'); console.finish()"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full, cwd=ROOT)
    assert done.returncode == 0 and console
