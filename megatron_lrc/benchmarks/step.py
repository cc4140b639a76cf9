"""`benchmark.py step`: tokens per second of whole optimizer steps, beside what arithmetic allows.

Contestants take turns on the same shapes, dtype and batch: LRC; ordinary training of the same student in the same
engine; LRC as one writes it first (`naive.py`). The bound on LRC / ordinary is the ratio of the FLOPs that they need
(`estimate/flops.py`): the student's forward and backward in both, the teacher's forward and the clone targets in LRC;
compose and pull back are not in it, since their share goes to nothing with the batch. Fractions of the machine's peak
are those FLOPs, compose and pull back included, over the time, over what a large matrix product reaches in the same
round.
"""

import argparse
import copy
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_lrc.benchmarks.measure import Spread, table
from megatron_lrc.benchmarks.models import write_config
from megatron_lrc.benchmarks.naive import NaiveClone
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.estimate.flops import step_flops
from megatron_lrc.estimate.published import TEACHER_SHAPES
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import TeacherDescription, describe_teacher
from megatron_lrc.hf.reader import Reader
from megatron_lrc.mcore import distributed, kernels
from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.mcore.optimizer import StageOptimizer, parameter_dtype
from megatron_lrc.mcore.paired_model import PairedModel
from megatron_lrc.train.build import build_stages_of_method
from megatron_lrc.train.initial_weights import InitialWeights
from megatron_lrc.train.step import Run, train_step
from megatron_lrc.validation import validate, validate_against_teacher

HELP = "tokens/s of a step: LRC, ordinary training of the same student, naive LRC, and the FLOP bound"
LRC, ORDINARY, NAIVE, PEAK = "lrc", "ordinary", "naive", "peak"
#: Of a square matrix product that shows the machine's peak.
_SIDE = {"cpu": 2048, "cuda": 8192}
#: Largest relative difference of the two ways' first losses, by dtype: rounding.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass
class Contestant:
    """step: one optimizer step. flops: that it needs. seconds: of each round."""

    name: str
    step: Callable[[], object]
    flops: float
    seconds: list[float] = field(default_factory=list)

    def measure(self, device: torch.device) -> None:
        start = time.perf_counter()
        self.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds.append(time.perf_counter() - start)


def add_flags(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--teacher", metavar="DIR", help="teacher, as in a training")
    source.add_argument("--shape", choices=TEACHER_SHAPES, help="a teacher of this shape with random weights")
    parser.add_argument("--student-hidden-size", required=True, type=int, metavar="N", help="as in a training")
    parser.add_argument("--seq-length", type=int, default=512, metavar="N", help="default: 512")
    parser.add_argument("--micro-batch-size", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--num-microbatches", type=int, default=8, metavar="N", help="of a step (default: 8)")
    parser.add_argument("--bf16", action="store_true", help="as in a training (default: fp32)")
    for name, choices in (("transformer-impl", ("auto", "local", "transformer_engine")), ("fp8-format", None)):
        parser.add_argument(f"--{name}", choices=choices, help="as in a training")
    parser.add_argument("--fp8-recipe", help="as in a training")
    parser.add_argument("--teacher-fp8", action="store_true", help="as in a training")
    parser.add_argument(
        "--contestants", default="lrc,ordinary,naive", metavar="LIST", help="which of lrc,ordinary,naive (default: all)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="also write every figure here")


def config_of(arguments: argparse.Namespace, teacher: str) -> Config:
    """The configuration of LRC with these flags. ConfigError if they cannot be meant."""
    for name in ("repeats", "num_microbatches"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected is a number from 1.")
    if unknown := set(arguments.contestants.split(",")) - {LRC, ORDINARY, NAIVE}:
        raise ConfigError(f"--contestants {','.join(sorted(unknown))}: expected are some of lrc,ordinary,naive.")
    config = Config()
    config.model.teacher, config.model.student_hidden_size = teacher, arguments.student_hidden_size
    training = config.training
    training.seq_length, training.train_iters, training.bf16 = arguments.seq_length, 1, arguments.bf16
    training.micro_batch_size = arguments.micro_batch_size
    training.global_batch_size = arguments.micro_batch_size * arguments.num_microbatches
    for name in ("transformer_impl", "fp8_format", "fp8_recipe", "teacher_fp8"):
        if getattr(arguments, name):
            setattr(config.compute, name, getattr(arguments, name))
    config.data.data_path = ["none"]  # tokens are random
    validate(config)
    kernels.check_machine(config)
    return config.resolved(1)


def run(arguments: argparse.Namespace, report: Callable[[str], None]) -> int:
    """0, or 1 where LRC and naive LRC do not agree. ConfigError for what a training would refuse too."""
    with tempfile.TemporaryDirectory() as folder:
        teacher = arguments.teacher or write_config(TEACHER_SHAPES[arguments.shape], Path(folder))
        config = config_of(arguments, teacher)
        base = describe_teacher(teacher, needs_weights=arguments.teacher is not None)
    validate_against_teacher(config, base.shape)
    reader = open_teacher(base) if arguments.teacher else InitialWeights(base, base.shape, std=0.02, seed=0)
    groups = distributed.start(config)
    entrants, difference = make_contestants(config, base, reader, groups, arguments.contestants.split(","))
    rounds = measure(entrants, arguments.repeats, groups.device, parameter_dtype(config), report)
    distributed.stop()
    tokens = config.training.seq_length * (config.training.global_batch_size or 0)
    for line in summary(rounds, tokens, bound(config, base), difference, groups.device):
        report(line)
    if arguments.json:
        figures = {each.name: {"seconds": each.seconds, "flops": each.flops} for each in rounds}
        content = {"arguments": vars(arguments), "cores": os.cpu_count(), "difference": difference, "rounds": figures}
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if difference is None or difference < _TOLERANCE[parameter_dtype(config)] else 1


def make_contestants(
    config: Config, base: TeacherDescription, reader: Reader, groups: Groups, names: list[str]
) -> tuple[list[Contestant], float | None]:
    """Each has taken its first step. And the largest relative difference of LRC's and naive LRC's losses in it."""
    shapes = base.shape, config.student_shape(base.shape)
    flops = step_flops(config, *shapes).total
    engine, num_microbatches = _engine(config, base, reader, groups), config.num_microbatches(1)
    entrants, losses = [], []
    if NAIVE in names:
        (stage,) = engine.stages
        assert isinstance(stage, PairedModel)
        projections = {name: matrix.detach() for name, matrix in stage.projections.named_matrices()}
        gains = {name: gain.detach() for name, gain in stage.projections.named_norms()}
        naive = NaiveClone(config, base, reader, projections, gains, num_microbatches=num_microbatches)
        tokens = _batches(config, base, groups)
        losses.append(naive.step(tokens))
        entrants.append(Contestant(NAIVE, lambda: naive.step(tokens), flops))
    if LRC in names or NAIVE in names:
        tokens_of_ours = _batches(config, base, groups)
        losses.append(train_step(engine, tokens_of_ours).losses.means(config))
        if LRC in names:
            entrants.insert(0, Contestant(LRC, lambda: train_step(engine, tokens_of_ours), flops))
    if ORDINARY in names:
        alone = copy.deepcopy(config)
        alone.model.method = "ordinary"
        student = config.student_shape(base.shape)
        ordinary = _engine(alone, base, InitialWeights(base, student, std=0.02, seed=0), groups)
        tokens_of_ordinary = _batches(config, base, groups)
        train_step(ordinary, tokens_of_ordinary)
        needed = step_flops(alone, student, student).total
        entrants.append(Contestant(ORDINARY, lambda: train_step(ordinary, tokens_of_ordinary), needed))
    return entrants, _difference(*losses) if NAIVE in names else None


def _engine(config: Config, base: TeacherDescription, reader: Reader, groups: Groups) -> Run:
    """A run as a training builds it."""

    def no_calibration() -> Iterator[dict[str, Tensor]]:
        raise AssertionError("--init random needs none")

    dtype = parameter_dtype(config)
    stages = build_stages_of_method(config, base, reader, groups, dtype, no_calibration, is_new=True)
    return Run(config, groups, stages, StageOptimizer(config, stages, groups), config.num_microbatches(1))


def _batches(config: Config, base: TeacherDescription, groups: Groups) -> Iterator[dict[str, Tensor]]:
    """The same random tokens for everybody, one step's over and over."""
    training, generator = config.training, torch.Generator().manual_seed(0)
    size = (config.num_microbatches(1), training.micro_batch_size, training.seq_length)
    positions = torch.arange(training.seq_length, device=groups.device).expand(size[1:])
    for ids in itertools.cycle(torch.randint(base.shape.vocab_size, size, generator=generator).to(groups.device)):
        yield {"tokens": ids, "labels": ids, "position_ids": positions, "loss_mask": torch.ones_like(ids).float()}


def _difference(naive: dict[str, float], ours: dict[str, float | None]) -> float:
    return max(abs(value / (ours[name] or 0.0) - 1) for name, value in naive.items())


def bound(config: Config, base: TeacherDescription) -> float:
    """FLOPs of ordinary training over those of LRC, compose and pull back left out."""
    needed = step_flops(config, base.shape, config.student_shape(base.shape))
    student = needed.total - needed.projections - needed.teacher_forward
    alone = copy.deepcopy(config)
    alone.model.method = "ordinary"
    shape = config.student_shape(base.shape)
    return step_flops(alone, shape, shape).total / (student + needed.teacher_forward)


def measure(
    entrants: list[Contestant], repeats: int, device: torch.device, dtype: torch.dtype, report: Callable[[str], None]
) -> list[Contestant]:
    """Rounds in which they take turns, the peak among them; it comes last in the result."""
    side = _SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    peak = Contestant(PEAK, lambda: torch.mm(left, right), 2.0 * side**3)
    for number in range(repeats):
        for entrant in entrants:
            entrant.measure(device)
        tries = Contestant(PEAK, peak.step, peak.flops)
        for _ in range(8):
            tries.measure(device)
        peak.seconds.append(min(tries.seconds))
        report(f"round {number + 1} of {repeats}")
    return [*entrants, peak]


def summary(
    rounds: list[Contestant], tokens: int, bound_ratio: float, difference: float | None, device: torch.device
) -> list[str]:
    by_name = {each.name: each for each in rounds}
    peak = by_name.pop(PEAK)
    rows = [["median (min-max)", "seconds", "tokens/s", "of the peak"]]
    for each in by_name.values():
        rates = [each.flops / own / (peak.flops / best) for own, best in zip(each.seconds, peak.seconds, strict=True)]
        speeds = [tokens / own for own in each.seconds]
        rows.append([each.name, Spread.of(each.seconds).text(2), Spread.of(speeds).text(0), Spread.of(rates).text(3)])
    lines = ["", f"one process on {device.type}; a step of {tokens} tokens", *table(rows), ""]
    gflops = Spread.of([peak.flops / best / 1e9 for best in peak.seconds])
    lines.append(f"peak: {gflops.text(0)} GFLOP/s, of a matrix product of {_SIDE[device.type]} x {_SIDE[device.type]}")

    def ratio(of: str, to: str) -> list[float]:
        return [b / a for a, b in zip(by_name[of].seconds, by_name[to].seconds, strict=True)]

    lines.append(f"bound on LRC / ordinary by FLOPs, without compose and pull back: {bound_ratio:.3f}")
    if {LRC, ORDINARY} <= by_name.keys():
        reached = ratio(LRC, ORDINARY)
        of_bound = Spread.of([each / bound_ratio for each in reached]).text(3)
        lines.append(f"tokens/s of LRC / ordinary: {Spread.of(reached).text(3)}, of the bound {of_bound}")
    if {LRC, NAIVE} <= by_name.keys():
        lines.append(f"tokens/s of LRC / naive: {Spread.of(ratio(LRC, NAIVE)).text(2)}")
    if difference is not None:
        lines.append(f"largest relative difference of LRC's and naive LRC's losses in the same step: {difference:.1e}")
    return lines
