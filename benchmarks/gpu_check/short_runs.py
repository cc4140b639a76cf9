"""Trainings in this process, as `python -m megatron_lrc train` has them, what they say kept off the console."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.left_behind import forget_scaling_state
from benchmarks.gpu_check.settings import Settings
from benchmarks.gpu_check.small_teacher import teacher_of
from megatron_lrc.config import Config, parse_config, validate
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.kernels import check_machine, choose_determinism
from megatron_lrc.methods import method_of
from megatron_lrc.train.jsonl import read_records
from megatron_lrc.train.loop import Trainer
from megatron_lrc.train.start_checks import check

#: Of the last lines that a training said, how many stand with the error that ended it.
LAST_LINES = 5


def run_flags(settings: Settings, data: str, steps: int) -> list[str]:
    """Of a run on the small teacher, in fp32."""
    sizes = settings.sizes
    values: dict[str, Any] = {
        "--teacher": teacher_of(settings),
        "--student-hidden-size": sizes.student,
        "--data-path": data,
        "--split": "90,10,0",
        "--seq-length": sizes.sequence,
        "--micro-batch-size": sizes.micro_batch,
        "--global-batch-size": sizes.micro_batch * sizes.num_microbatches,
        "--train-iters": steps,
        "--lr": 1e-3,
        "--lr-warmup-iters": 0,
        "--init-method-std": 0.06,
        "--log-interval": 1,
        "--eval-iters": 0,
    }
    return [str(part) for pair in values.items() for part in pair]


def parse(flags: list[str]) -> Config:
    """The configuration of one process. ConfigError where it cannot be meant."""
    config = parse_config(flags)
    validate(method_of(config), world_size=1)
    return config.resolved(1)


def train(config: Config) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The records of its steps, and what it has trained, on the CPU, by its keys in a checkpoint."""
    forget_scaling_state()
    said = io.StringIO()
    with _determinism_undone(), contextlib.redirect_stdout(said):
        choose_determinism(config)
        check_machine(config)
        groups = distributed.start(config)
        try:
            checked = check(config, 1)
            trainer = Trainer(checked.config, checked, groups)
            trainer.train()
            trained = {
                f"{one.key} {one.layer}": one.parameter.detach().cpu().clone()
                for stage in trainer.run.stages
                for one in stage.trained()
            }
        except Exception:
            print("\n".join(said.getvalue().splitlines()[-LAST_LINES:]), file=sys.stderr)
            raise
        finally:
            distributed.stop()
    return list(read_records(Path(str(config.checkpoint.save)) / "metrics.jsonl")), trained


@contextlib.contextmanager
def _determinism_undone() -> Iterator[None]:
    """What --deterministic-mode sets for the whole process."""
    name = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
    before = os.environ.get(name)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
