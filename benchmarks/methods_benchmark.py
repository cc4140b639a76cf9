"""`benchmark.py methods`: tokens per second of an optimizer step of every method, as a ratio to ordinary training.

All methods have the same teacher, student width, precision and batch, and take turns, round by round, so that each
round has ratios of its own and what they differ by is the noise. Sheared is measured in its first phase, in which it
trains the teacher with masks; once the model is cut, its step is that of ordinary training. Minitron's step is that of
logits: neither has losses between layers, and both train all of the student.
"""

import argparse
import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch

from benchmarks.measure import Spread, table, timed
from benchmarks.measured_models import (
    add_size_flags,
    add_teacher_flags,
    build_run,
    check_positive,
    open_base,
    same_batch,
)
from megatron_lrc.config import Config, ConfigError, validate_against_teacher
from megatron_lrc.hf.families import TeacherDescription
from megatron_lrc.hf.reader import Reader
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.kernels import check_machine
from megatron_lrc.mcore.optimizer import parameter_dtype
from megatron_lrc.methods import METHODS, method_of
from megatron_lrc.methods.ordinary.initial_weights import InitialWeights
from megatron_lrc.train.step import Run, train_step

ORDINARY = "ordinary"
#: Thousand tokens per second in the efficiency table of arXiv 2505.12781.
PUBLISHED = {"lrc": 84, ORDINARY: 146, "tinybert": 65, "sheared": 30}


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_teacher_flags(parser)
    add_size_flags(parser, seq_length=2048)
    parser.add_argument("--micro-batch-size", type=int, default=1, metavar="N", help="as in a training (default: 1)")
    parser.add_argument("--num-microbatches", type=int, default=2, metavar="N", help="of a step (default: 2)")
    parser.add_argument(
        "--methods",
        default=",".join(METHODS),
        metavar="LIST",
        help=f"which of them; all are in memory at once (default: {','.join(METHODS)})",
    )
    parser.add_argument("--json", metavar="FILE", help="also write every figure here (default: not)")


def run(arguments: argparse.Namespace, report: Callable[[str], None]) -> int:
    """ConfigError for what a training would refuse too."""
    names = _methods(arguments)
    base, reader = open_base(arguments)
    configs = {name: _config_of(arguments, base, name) for name in names}
    groups = distributed.start(configs[ORDINARY])
    try:
        seconds = measure(configs, base, reader, groups, arguments.repeats, report)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"The methods do not fit into the device's memory together ({str(error).split('. ')[0]}). Give fewer "
            "--methods, a smaller --micro-batch-size or --seq-length."
        ) from error
    finally:
        distributed.stop()
    tokens = arguments.micro_batch_size * arguments.num_microbatches * arguments.seq_length
    report(
        f"\n{base.directory.name}, hidden size {base.shape.hidden_size} to {arguments.student_hidden_size}; a step of "
        f"{arguments.num_microbatches} micro-batches of {arguments.micro_batch_size} x {arguments.seq_length} tokens; "
        f"{arguments.repeats} rounds: median (lowest-highest)"
    )
    for line in table(rows(seconds, tokens)):
        report(line)
    if arguments.json:
        content = {"arguments": vars(arguments), "cores": os.cpu_count(), "tokens": tokens, "seconds": seconds}
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def _methods(arguments: argparse.Namespace) -> list[str]:
    check_positive(arguments, "repeats", "seq_length", "student_hidden_size", "micro_batch_size", "num_microbatches")
    names = arguments.methods.split(",")
    if unknown := set(names) - set(METHODS):
        raise ConfigError(f"--methods {','.join(sorted(unknown))}: expected are any of {','.join(METHODS)}.")
    return list(dict.fromkeys([ORDINARY, *names]))


def _config_of(arguments: argparse.Namespace, base: TeacherDescription, name: str) -> Config:
    """Of a run by this method, far from its end."""
    config = Config()
    config.model.teacher, config.model.student_hidden_size = str(base.directory), arguments.student_hidden_size
    config.model.method = name  # type: ignore[assignment]
    training = config.training
    training.seq_length, training.micro_batch_size = arguments.seq_length, arguments.micro_batch_size
    training.global_batch_size = arguments.micro_batch_size * arguments.num_microbatches
    training.bf16, training.train_iters = arguments.bf16, 1000
    validate_against_teacher(method_of(config), base.shape)
    check_machine(config)
    return config.resolved(1)


def measure(
    configs: dict[str, Config],
    base: TeacherDescription,
    reader: Reader,
    groups: distributed.Groups,
    repeats: int,
    report: Callable[[str], None],
) -> dict[str, list[float]]:
    """Method -> seconds of a step in each round. A first step of each, which is not among them, warms up."""
    batches = same_batch(configs[ORDINARY], base.shape.vocab_size, groups.device)
    runs: dict[str, Run] = {}
    for name, config in configs.items():
        weights = reader
        if method_of(config).starts_anew:
            shape = method_of(config).student_shape(base.shape)
            weights = InitialWeights(base, shape, std=config.projection.init_method_std, seed=1)
        runs[name] = build_run(deepcopy(config), base, weights, groups, batches)
        train_step(runs[name], batches)
        report(f"{name}: {parameter_dtype(config)}, {groups.device.type}, ready")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats):
        for name, trained in runs.items():
            seconds[name].append(timed(lambda trained=trained: train_step(trained, batches), groups.device)[0])
        report(f"round {number + 1} of {repeats}")
    return seconds


def rows(seconds: dict[str, list[float]], tokens: int) -> list[list[str]]:
    """Names of the columns, then a row for each method. tokens: of a step."""
    found = [["method", "tokens/s", "seconds of a step", "over ordinary", "in the paper"]]
    for name, own in seconds.items():
        ratios = [ordinary / each for ordinary, each in zip(seconds[ORDINARY], own, strict=True)]
        published = PUBLISHED.get(name)
        found.append(
            [
                name,
                Spread.of([tokens / each for each in own]).text(0),
                Spread.of(own).text(3),
                Spread.of(ratios).text(3),
                f"{published / PUBLISHED[ORDINARY]:.3f} ({published}K tokens/s)" if published else "",
            ]
        )
    return found
