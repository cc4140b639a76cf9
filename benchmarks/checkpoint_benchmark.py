"""`benchmark.py checkpoint`: what saving costs the training loop, in the background against at once.

One process, real models and optimizer, random tokens. Both ways save once before, since the plan is made then. A round
is: steps without a save; a save at once; a save in the background, with steps until it is written. The cost of the
second is the time that the loop waits; of the third, that and what the steps took longer than those of the same round
without a save: writing takes processor and disk from them.
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

from benchmarks.measure import Spread, table, total_bytes
from benchmarks.measured_models import add_model_flags, build, config_of
from megatron_lrc.checkpoints.run_directory import RunState, newest_checkpoint
from megatron_lrc.config import Config
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.checkpoint_writer import CheckpointWriter
from megatron_lrc.train.garbage import collected_by_the_loop
from megatron_lrc.train.step import Run, train_step


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
    add_model_flags(parser)
    parser.add_argument("--folder", metavar="DIR", help="where to write (default: the folder for temporary files)")
    parser.add_argument("--json", metavar="FILE", help="also write every figure here")


def run(arguments: argparse.Namespace, report: Callable[[str], None]) -> int:
    """0. ConfigError for what a training would refuse too."""
    config = config_of(arguments)
    trained, tokens = build(config)
    with tempfile.TemporaryDirectory(dir=arguments.folder, ignore_cleanup_errors=True) as folder:
        rounds, savers = [], Savers.of(config, trained, folder)
        with collected_by_the_loop():  # as in a training
            measure_round(savers, trained, tokens)
            for number in range(arguments.repeats):
                rounds.append(measure_round(savers, trained, tokens))
                report(f"round {number + 1} of {arguments.repeats}")
        newest = newest_checkpoint(folder)
        assert newest is not None
        size = total_bytes(newest.iterdir())
        savers.background.close()
    distributed.stop()
    for line in summary(rounds, size, trained.groups.device):
        report(line)
    if arguments.json:
        content = {"bytes": size, "cores": os.cpu_count(), "rounds": [asdict(each) for each in rounds]}
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


@dataclass
class Savers:
    """Both ways to save, and the step of the last save: each is of a step of its own, and the one before is removed."""

    at_once: CheckpointWriter
    background: CheckpointWriter
    step: int = 0

    @classmethod
    def of(cls, config: Config, trained: Run, folder: str) -> "Savers":
        def writer(*, in_background: bool) -> CheckpointWriter:
            settings = replace(config.checkpoint, save=folder, keep_last=1, async_save=in_background)
            return CheckpointWriter(replace(config, checkpoint=settings), trained.groups)

        return cls(writer(in_background=False), writer(in_background=True))

    def start(self, writer: CheckpointWriter, trained: Run) -> float:
        """Seconds that it took to return."""
        self.step += 1
        start = time.perf_counter()
        writer.start(RunState(step=self.step), trained.stages, trained.optimizer)
        return time.perf_counter() - start


def measure_round(savers: Savers, trained: Run, batches: Iterator[dict[str, Tensor]]) -> Round:
    def step() -> float:
        start = time.perf_counter()
        train_step(trained, batches)  # waits for the device at its end
        return time.perf_counter() - start

    def finish(writer: CheckpointWriter) -> float:
        start = time.perf_counter()
        writer.finish()
        return time.perf_counter() - start

    alone = median(step() for _ in range(5))
    at_once = savers.start(savers.at_once, trained) + finish(savers.at_once)
    started, slowed = time.perf_counter(), 0.0
    blocked = savers.start(savers.background, trained)
    while savers.background.is_writing:
        slowed += step() - alone
    written_after = time.perf_counter() - started
    return Round(alone, at_once, blocked + finish(savers.background), slowed, written_after)


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
