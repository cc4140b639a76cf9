"""`benchmark.py compose`: what generating the student costs, against its bare matrix products and a micro-batch.

Once per optimizer step the student's weights are composed and their gradients pulled back, whatever the number of
micro-batches; so the share of both in a step falls as that grows. The bare products are one `torch.mm` for each
projected matrix and direction, of the same shapes and dtype, into memory that is there: below that nothing can go.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Spread, table
from benchmarks.measured_models import add_model_flags, build, config_of
from megatron_lrc.clone.sites import select
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.schedules import forward_backward
from megatron_lrc.methods.lrc.paired_model import PairedModel
from megatron_lrc.train.step import Run

MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Round:
    """Seconds."""

    compose: float
    pull_back: float
    products: float  # of both
    microbatch: float  # forward and backward

    @property
    def both(self) -> float:
        return self.compose + self.pull_back


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    parser.add_argument("--json", metavar="FILE", help="also write every figure here")


def run(arguments: argparse.Namespace, report: Callable[[str], None]) -> int:
    """0. ConfigError for what a training would refuse too."""
    config = config_of(arguments)
    trained, batches = build(config)
    products = list(bare_products(trained))
    measure_round(trained, batches, products)  # what happens only once is not measured
    rounds = []
    for number in range(arguments.repeats):
        rounds.append(measure_round(trained, batches, products))
        report(f"round {number + 1} of {arguments.repeats}")
    distributed.stop()
    for line in summary(rounds, arguments.seq_length, trained.groups.device):
        report(line)
    if arguments.json:
        content = {"arguments": vars(arguments), "cores": os.cpu_count(), "rounds": [asdict(each) for each in rounds]}
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def bare_products(trained: Run) -> Iterator[Callable[[], Tensor]]:
    """For each projected matrix W_T [m, D] and P [D, d]: W_T @ P, and the gradient W_T^T @ dW_S in its precision."""
    for stage in trained.stages:
        assert isinstance(stage, PairedModel)
        size = stage.shapes.student.hidden_size
        for weight in stage.cloned_weights:
            teacher = select(weight.site, weight.teacher, weight.heads)
            matrix = teacher.flatten(0, -2) if weight.site.projected == "input" else teacher.t()
            wide = torch.promote_types(matrix.dtype, torch.float32)
            projection = torch.ones(matrix.shape[1], size, dtype=matrix.dtype, device=matrix.device)
            student = torch.empty(matrix.shape[0], size, dtype=matrix.dtype, device=matrix.device)
            gradient = torch.empty(matrix.shape[1], size, dtype=wide, device=matrix.device)
            yield partial(torch.mm, matrix, projection, out=student)
            yield partial(torch.mm, matrix.t().to(wide), student.to(wide), out=gradient)


def measure_round(trained: Run, batches: Iterator[dict[str, Tensor]], products: list[Callable[[], Tensor]]) -> Round:
    def seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        if trained.groups.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def all_products() -> None:
        for product in products:
            product()

    trained.optimizer.zero_grad()
    trained.zero_student_grads()
    compose = seconds(trained.compose)
    microbatch = seconds(lambda: forward_backward(trained.stages, batches, trained.config, num_microbatches=1))
    pull_back = seconds(trained.pull_back)
    return Round(compose, pull_back, seconds(all_products), microbatch)


def summary(rounds: list[Round], seq_length: int, device: torch.device) -> list[str]:
    def row(name: str, values: list[float], decimals: int = 3) -> list[str]:
        return [name, Spread.of(values).text(decimals)]

    rows = [
        ["median (min-max)", "seconds"],
        row("compose", [each.compose for each in rounds]),
        row("pull back", [each.pull_back for each in rounds]),
        row("their bare matrix products", [each.products for each in rounds]),
        row(f"a micro-batch of {seq_length} tokens", [each.microbatch for each in rounds]),
        ["", "ratio"],
        row("compose + pull back, over the products", [each.both / each.products for each in rounds], 2),
        ["micro-batches per step", "share of compose + pull back"],
    ]
    for count in MICROBATCHES:
        rows.append(row(str(count), [each.both / (each.both + count * each.microbatch) for each in rounds]))
    return ["", f"one process on {device.type}", *table(rows)]
