"""`benchmark.py checkpoint`: what saving costs the training loop, in the background against at once.

One process, real models and optimizer, random tokens. A round is: steps without a save; a save at once; a save in the
background, with steps until it is written. The cost of the second is the time that the loop waits; of the third, that
and what the steps took longer than those of the same round without a save, since writing takes processor and disk
from them.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from megatron_lrc.benchmarks.measure import Spread, table
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.checkpoint_writer import CheckpointWriter
from megatron_lrc.mcore.optimizer import ProjectionOptimizer, parameter_dtype
from megatron_lrc.mcore.run_directory import RunState, newest_checkpoint, total_bytes
from megatron_lrc.train.build import build_stages, initialize
from megatron_lrc.train.step import Run, train_step

HELP = "saving in the background against saving at once: what each costs the training loop"


@dataclass(frozen=True)
class Round:
    """Seconds. at_once, blocked: the loop waits. steps_slowed: what steps took longer while files were written."""

    step: float
    at_once: float
    blocked: float
    steps_slowed: float
    written_after: float

    @property
    def in_background(self) -> float:
        return self.blocked + self.steps_slowed


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, metavar="DIR", help="teacher, as in a training")
    parser.add_argument("--student-hidden-size", required=True, type=int, metavar="N", help="as in a training")
    parser.add_argument("--seq-length", type=int, default=256, metavar="N", help="tokens of a step (default: 256)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument("--folder", metavar="DIR", help="where to write (default: the folder for temporary files)")
    parser.add_argument("--json", metavar="FILE", help="also write every figure here")


def run(arguments: argparse.Namespace, report: Callable[[str], None]) -> int:
    """0. ConfigError for what a training would refuse too."""
    if arguments.repeats < 1 or arguments.seq_length < 1 or arguments.student_hidden_size < 1:
        raise ConfigError("--repeats, --seq-length and --student-hidden-size are whole numbers from 1.")
    config = Config()
    config.model.teacher, config.model.student_hidden_size = arguments.teacher, arguments.student_hidden_size
    config.training.seq_length, config.training.train_iters = arguments.seq_length, 1
    config = config.resolved(1)
    trained, tokens = build(config)
    with tempfile.TemporaryDirectory(dir=arguments.folder, ignore_cleanup_errors=True) as folder:
        rounds = []
        for number in range(arguments.repeats):
            rounds.append(measure_round(config, trained, tokens, Path(folder)))
            report(f"round {number + 1} of {arguments.repeats}")
        newest = newest_checkpoint(folder)
        assert newest is not None
        size = total_bytes(newest.iterdir())
    distributed.stop()
    for line in summary(rounds, size, trained.groups.device):
        report(line)
    if arguments.json:
        content = {"bytes": size, "cores": os.cpu_count(), "rounds": [asdict(each) for each in rounds]}
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def build(config: Config) -> tuple[Run, Iterator[dict[str, Tensor]]]:
    """Models and optimizer of a run of one process, and an endless supply of one micro-batch."""
    description = describe_teacher(str(config.model.teacher))
    groups = distributed.start(config)
    stages = build_stages(config, description, open_teacher(description), groups, parameter_dtype(config))

    def batches() -> Iterator[dict[str, Tensor]]:
        ids = torch.randint(description.shape.vocab_size, (1, config.training.seq_length), device=groups.device)
        positions = torch.arange(config.training.seq_length, device=groups.device)[None]
        while True:
            yield {"tokens": ids, "labels": ids, "position_ids": positions, "loss_mask": torch.ones_like(ids).float()}

    initialize(config, stages, batches, groups)
    return Run(config, groups, stages, ProjectionOptimizer(config, stages, groups), 1), batches()


def measure_round(config: Config, trained: Run, batches: Iterator[dict[str, Tensor]], folder: Path) -> Round:
    """Each save is of its own step, and replaces nothing."""

    def step() -> float:
        start = time.perf_counter()
        train_step(trained, batches)  # waits for the device at its end
        return time.perf_counter() - start

    def writer(*, in_background: bool) -> CheckpointWriter:
        settings = replace(config.checkpoint, save=str(folder), keep_last=1, async_save=in_background)
        return CheckpointWriter(replace(config, checkpoint=settings), trained.groups)

    step()  # what happens only once is not measured
    alone = median(step() for _ in range(5))

    at_once = writer(in_background=False)
    start = time.perf_counter()
    at_once.start(RunState(step=1), trained.stages, trained.optimizer)
    at_once.finish()
    seconds_at_once = time.perf_counter() - start

    background = writer(in_background=True)
    start = time.perf_counter()
    background.start(RunState(step=2), trained.stages, trained.optimizer)
    blocked = time.perf_counter() - start
    slowed = 0.0
    while background.is_writing:
        slowed += step() - alone
    written_after = time.perf_counter() - start
    finish = time.perf_counter()
    background.finish()
    blocked += time.perf_counter() - finish
    return Round(alone, seconds_at_once, blocked, slowed, written_after)


def summary(rounds: list[Round], size: int, device: torch.device) -> list[str]:
    def text(values: list[float], decimals: int = 3) -> str:
        return Spread.of(values).text(decimals)

    rows = [
        ["median (min-max)", "seconds", "of a save at once"],
        ["a step", text([each.step for each in rounds]), ""],
        ["saved at once", text([each.at_once for each in rounds]), "1"],
        [
            "in the background, waiting",
            text([each.blocked for each in rounds]),
            text([each.blocked / each.at_once for each in rounds]),
        ],
        [
            "in the background, and slower steps",
            text([each.in_background for each in rounds]),
            text([each.in_background / each.at_once for each in rounds]),
        ],
        ["in the background, until it is there", text([each.written_after for each in rounds]), ""],
    ]
    return ["", f"a checkpoint of {size / 1e9:.2f} GB, one process on {device.type}", *table(rows)]
