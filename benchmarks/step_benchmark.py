"""`benchmark.py step`: tokens per second of whole optimizer steps: LRC, ordinary training, and a naive LRC.

Contestants have the same sizes, precision, batch and number of threads, and take turns:

    LRC        the product's own step, with all clone losses, LM and KL
    ordinary   the same step of the same engine with --method ordinary: the student alone, on the LM loss
    naive LRC  the same method in transformers' models and plain autograd (`naive.py`), in a process of its own

Before anything is timed, the first steps of LRC and of naive LRC, from the same projections and on the same batch, have
to agree in every loss and in the gradient norm.

The bound on LRC / ordinary is the ratio of what both have to compute: FLOPs of an ordinary step over those of an LRC
step without composing and pulling back, which are no part of the method's loss ("6 P_S against 6 P_S + 2 P_T").

There are two peaks to compare a step with. One large square product says what the machine can do at most; a step's own
products, done again alone (`bare_products.py`), what its shapes leave of that.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bare_products import BareProducts, products_of
from benchmarks.breakdown import breakdown, flops_by_part
from benchmarks.measure import Spread, table, timed
from benchmarks.measured_models import (
    add_size_flags,
    add_teacher_flags,
    build_run,
    check_positive,
    open_base,
    same_batch,
)
from benchmarks.naive import NaiveClone, NaiveReport
from benchmarks.naive_process import NaiveProcess, Order
from megatron_lrc.config import (
    SETTINGS,
    Config,
    ConfigError,
    check_precision,
    convert,
    raise_all,
    validate_against_teacher,
)
from megatron_lrc.estimate.flops import StepFlops, step_flops
from megatron_lrc.hf.families import TeacherDescription
from megatron_lrc.hf.reader import Reader
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.kernels import check_machine, describe_kernels, uses_transformer_engine
from megatron_lrc.mcore.optimizer import parameter_dtype
from megatron_lrc.methods import method_of
from megatron_lrc.methods.lrc.paired_model import PairedModel
from megatron_lrc.methods.ordinary.initial_weights import InitialWeights
from megatron_lrc.train.step import Run, StepReport, train_step

LRC, ORDINARY, NAIVE = CONTESTANTS = ("lrc", "ordinary", "naive")
NAMES = {LRC: "LRC", ORDINARY: "ordinary", NAIVE: "naive LRC"}
#: Passed on to the configuration, as flags of a training.
COMPUTE_FLAGS = ("transformer_impl", "attention_backend", "fp8_format", "fp8_recipe", "teacher_fp8")
#: What rounding may make of losses and gradient norm, relatively; of the KL at least the last: at tau = 40 both
#: distributions are nearly uniform, and it is a small sum of large summands.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp8": 0.2}
KL_TOLERANCE = 1e-3

Batches = Iterator[dict[str, Tensor]]


@dataclass
class Contestant:
    """step: one whole optimizer step, its seconds and its report. flops: everything that it has to compute. products:
    its matrix products alone, where this process can see them; product_seconds: what they take in each round."""

    step: Callable[[], tuple[float, object]]
    flops: float
    products: BareProducts | None = None
    seconds: list[float] = field(default_factory=list)
    product_seconds: list[float] = field(default_factory=list)

    def shares(self) -> list[float]:
        """Of each round's step, what its products take alone."""
        return [bare / whole for bare, whole in zip(self.product_seconds, self.seconds, strict=True)]


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_teacher_flags(parser)
    add_size_flags(parser, seq_length=2048)
    parser.add_argument("--micro-batch-size", type=int, default=1, metavar="N", help="as in a training (default: 1)")
    parser.add_argument("--num-microbatches", type=int, default=8, metavar="N", help="of a step (default: 8)")
    parser.add_argument(
        "--contestants",
        default=",".join(CONTESTANTS),
        metavar="LIST",
        help="which of them; all are in memory at once, naive in a process of its own (default: lrc,ordinary,naive)",
    )
    for name in COMPUTE_FLAGS:
        flag = "--" + name.replace("_", "-")
        if SETTINGS[name].kind is bool:
            parser.add_argument(flag, action="store_true", help="as in a training (default: off)")
        else:
            choices = "{" + ",".join(SETTINGS[name].choices) + "}"
            text = f"as in a training (default: {SETTINGS[name].default or 'none'})"
            parser.add_argument(flag, default=SETTINGS[name].default, metavar=choices, help=text)
    parser.add_argument("--profile", action="store_true", help="also where the time of an LRC step goes (default: off)")
    parser.add_argument("--json", metavar="FILE", help="also write every figure here (default: not)")


def run(arguments: argparse.Namespace, report: Callable[[str], None]) -> int:
    """0, or 1 where the naive LRC computes something else. ConfigError for what a training would refuse too."""
    names = _contestants(arguments)
    base, reader = open_base(arguments)
    config = _config_of(arguments, base)
    with ExitStack() as at_the_end:
        naive = at_the_end.enter_context(NaiveProcess()) if NAIVE in names else None
        groups = distributed.start(config)
        at_the_end.callback(distributed.stop)
        try:
            bench = Bench(config, base, reader, groups, names, report, naive)
            if not bench.agrees():
                return 1
            for number in range(arguments.repeats):
                bench.measure_round()
                report(f"round {number + 1} of {arguments.repeats}")
            parts = breakdown(bench.runs[LRC], bench.batches, arguments.repeats) if arguments.profile else {}
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"The contestants do not fit into the device's memory together ({str(error).split('. ')[0]}). Give "
                "fewer --contestants (lrc,ordinary, then lrc,naive), a smaller --micro-batch-size or --seq-length."
            ) from error
    for line in bench.summary(parts):
        report(line)
    if arguments.json:
        content = {"arguments": vars(arguments), "cores": os.cpu_count(), **bench.figures(parts)}
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def _contestants(arguments: argparse.Namespace) -> list[str]:
    check_positive(arguments, "repeats", "seq_length", "student_hidden_size", "micro_batch_size", "num_microbatches")
    names = arguments.contestants.split(",")
    if unknown := set(names) - set(CONTESTANTS):
        raise ConfigError(f"--contestants {','.join(sorted(unknown))}: expected are any of {','.join(CONTESTANTS)}.")
    if LRC not in names and (NAIVE in names or arguments.profile):
        asking = "--profile" if arguments.profile else "--contestants naive"
        raise ConfigError(f"{asking} needs the contestant lrc. Add it to --contestants.")
    return [name for name in CONTESTANTS if name in names]


def _config_of(arguments: argparse.Namespace, base: TeacherDescription) -> Config:
    """The configuration of the LRC run. ConfigError where sizes, precision and machine do not go together."""
    config = Config()
    config.model.teacher, config.model.student_hidden_size = str(base.directory), arguments.student_hidden_size
    training = config.training
    training.seq_length, training.micro_batch_size = arguments.seq_length, arguments.micro_batch_size
    training.global_batch_size = arguments.micro_batch_size * arguments.num_microbatches
    training.bf16, training.train_iters = arguments.bf16, 1
    for name in COMPUTE_FLAGS:
        try:
            setattr(config.compute, name, convert(SETTINGS[name], getattr(arguments, name)))
        except ValueError as error:
            raise ConfigError(f"--{name.replace('_', '-')}: {error}") from error
    raise_all(list(check_precision(config)))
    validate_against_teacher(method_of(config), base.shape)
    check_machine(config)
    return config.resolved(1)


class Bench:
    """The contestants, and what has been measured. Making it builds them all and takes a first step of each."""

    def __init__(
        self,
        config: Config,
        base: TeacherDescription,
        reader: Reader,
        groups: distributed.Groups,
        names: list[str],
        report: Callable[[str], None],
        naive: NaiveProcess | None,
    ):
        self.config, self.base, self.device, self.report = config, base, groups.device, report
        self.dtype, self.num_microbatches = parameter_dtype(config), config.num_microbatches(1)
        self.batches = same_batch(config, base.shape.vocab_size, groups.device)
        self.student_shape = method_of(config).student_shape(base.shape)
        self.flops = step_flops(config, base.shape, self.student_shape)
        self.ordinary_flops = step_flops(_ordinary(config), base.shape, self.student_shape)
        self.runs: dict[str, Run] = {}
        self.contestants: dict[str, Contestant] = {}
        self.gemm: list[float] = []  # FLOP/s
        self.differences: dict[str, float] = {}
        if LRC in names:
            self._add_run(LRC, config, base, reader, groups, self.flops.total)
        if naive is not None:  # before a step changes the projections
            self._add_naive(naive, reader)
        if ORDINARY in names:
            new = InitialWeights(base, self.student_shape, std=config.projection.init_method_std, seed=1)
            self._add_run(ORDINARY, _ordinary(config), base, new, groups, self.ordinary_flops.total)
        first_steps = {name: contestant.step()[1] for name, contestant in self.contestants.items()}
        for name in self.runs:
            self._note_products(self.contestants[name])
        if naive is not None:
            self.differences = differences(first_steps[LRC], first_steps[NAIVE], config)

    def _add_run(
        self,
        name: str,
        config: Config,
        base: TeacherDescription,
        reader: Reader,
        groups: distributed.Groups,
        flops: float,
    ) -> None:
        trained = build_run(config, base, reader, groups, self.batches)
        self.runs[name] = trained
        self.contestants[name] = Contestant(
            lambda: timed(lambda: train_step(trained, self.batches), self.device), flops
        )

    def _add_naive(self, naive: NaiveProcess, reader: Reader) -> None:
        (stage,) = self.runs[LRC].stages
        assert isinstance(stage, PairedModel)
        order = Order(
            form=NaiveClone,
            config=self.config,
            teacher=self.base,
            weights=reader if isinstance(reader, InitialWeights) else None,
            dtype=self.dtype,
            device=self.device,
            batch={name: tensor.cpu() for name, tensor in next(self.batches).items()},
            num_microbatches=self.num_microbatches,
            num_threads=torch.get_num_threads(),
        )
        naive.build(
            order,
            projections=dict(stage.projections.named_matrices()),
            norms=dict(stage.projections.named_norms()),
        )
        composing = (self.num_microbatches - 1) * self.flops.projections
        self.contestants[NAIVE] = Contestant(naive.step, self.flops.total + composing)

    def _note_products(self, contestant: Contestant) -> None:
        """Not of Transformer Engine's layers, which multiply out of torch's sight."""
        if not uses_transformer_engine(self.config):
            contestant.products = products_of(contestant.step)

    def agrees(self) -> bool:
        """Whether naive LRC computes what LRC does; says so. True without it."""
        if not self.differences:
            return True
        precision = "fp8" if self.config.compute.fp8_format else "bf16" if self.config.training.bf16 else "fp32"
        allowed = dict.fromkeys(self.differences, TOLERANCE[precision])
        allowed["KL"] = max(allowed["KL"], KL_TOLERANCE)
        is_rounding = all(self.differences[name] <= allowed[name] for name in allowed)
        each = ", ".join(f"{name} {value:.1e} ({allowed[name]:.0e})" for name, value in self.differences.items())
        verdict = "they are the same method" if is_rounding else "they are NOT the same method, so nothing is timed"
        self.report(
            f"first step of LRC and of naive LRC: largest relative differences (and what is taken for rounding in "
            f"{precision}): {each}: {verdict}"
        )
        return is_rounding

    def measure_round(self) -> None:
        self.gemm.append(gemm_rate(self.dtype, self.device))
        for contestant in self.contestants.values():
            seconds, _ = contestant.step()
            contestant.seconds.append(seconds)
            if contestant.products:
                seconds, _ = timed(contestant.products.run, self.device)
                contestant.product_seconds.append(seconds)

    @property
    def tokens(self) -> int:
        """Of one step."""
        training = self.config.training
        return training.micro_batch_size * self.num_microbatches * training.seq_length

    @property
    def bound(self) -> float:
        """On tokens/s of LRC over those of ordinary training."""
        return self.ordinary_flops.total / (self.flops.total - self.flops.projections)

    def ratios(self, over: str) -> list[float]:
        """Round by round, tokens/s of LRC over those of another contestant."""
        pairs = zip(self.contestants[LRC].seconds, self.contestants[over].seconds, strict=True)
        return [other / own for own, other in pairs]

    def figures(self, parts: dict[str, list[float]]) -> dict:
        return {
            "device": _device_name(self.device),
            "tokens": self.tokens,
            "differences": self.differences,
            "bound": self.bound,
            "gemm_flops_per_second": self.gemm,
            "contestants": {
                name: {"flops": each.flops, "seconds": each.seconds, "product_seconds": each.product_seconds}
                for name, each in self.contestants.items()
            },
            "profile": parts,
        }

    def summary(self, parts: dict[str, list[float]]) -> list[str]:
        first, *_ = self.runs.values()
        kernels = describe_kernels(self.config, self.dtype, self.student_shape, "student", first.optimizer.kind)
        training, student = self.config.training, self.student_shape.hidden_size
        lines = [
            "",
            f"{self.base.directory.name}, hidden size {self.base.shape.hidden_size} to {student}; a step of "
            f"{self.num_microbatches} micro-batches of {training.micro_batch_size} x {training.seq_length} tokens, "
            f"{str(self.dtype).removeprefix('torch.')}; one process on {_device_name(self.device)}"
            + (f"; {kernels}" if kernels else ""),
            *([_explain_naive(self.device)] if NAIVE in self.contestants else []),
            *table(self._rows()),
        ]
        if LRC in self.contestants and ORDINARY in self.contestants:
            lines += ["", *_explain_bound(self.flops, self.ordinary_flops, self.tokens)]
        if parts:
            lines += _profile_lines(parts, flops_by_part(self.config, self.base.shape, self.student_shape))
        return lines

    def _rows(self) -> list[list[str]]:
        rows = [["median (min-max)", "tokens/s", "seconds", "of the GEMM peak", "products alone, of it"]]
        for name, each in sorted(self.contestants.items(), key=lambda item: CONTESTANTS.index(item[0])):
            rates = Spread.of([self.tokens / seconds for seconds in each.seconds])
            shares = [each.flops / seconds / peak for seconds, peak in zip(each.seconds, self.gemm, strict=True)]
            bare = Spread.of(each.shares()).text(3) if each.product_seconds else ""
            rows.append([NAMES[name], rates.text(0), Spread.of(each.seconds).text(3), Spread.of(shares).text(3), bare])
        peak = Spread.of([rate / 1e12 for rate in self.gemm])
        rows.append([f"GEMM peak, TFLOP/s: {_gemm_size(self.device)}^3", "", "", peak.text(3)])
        rows.append(["", "ratio"])
        if LRC in self.contestants and ORDINARY in self.contestants:
            ratios = self.ratios(ORDINARY)
            rows.append(["LRC / ordinary", Spread.of(ratios).text(3)])
            rows.append(["its bound by FLOPs", f"{self.bound:.3f}"])
            if own := self.contestants[LRC].product_seconds:
                pairs = zip(own, self.contestants[ORDINARY].product_seconds, strict=True)
                rows.append(["of their products alone", Spread.of([other / mine for mine, other in pairs]).text(3)])
            shares = Spread.of([ratio / self.bound for ratio in ratios])
            rows.append(["measured / bound (target: 0.90 or more)", shares.text(3)])
        if NAIVE in self.contestants:
            rows.append(["LRC / naive LRC (target: 1.5 or more)", Spread.of(self.ratios(NAIVE)).text(2)])
        return [row + [""] * (len(rows[0]) - len(row)) for row in rows]


def _ordinary(config: Config) -> Config:
    """The same sizes and precision, with the student alone."""
    ordinary = deepcopy(config)
    ordinary.model.method = "ordinary"
    ordinary.compute = replace(ordinary.compute, teacher_fp8=False)
    return ordinary


def differences(lrc: object, naive: object, config: Config) -> dict[str, float]:
    """Relative differences of two first steps; of the clone terms, one for each layer and matrix, the largest."""
    assert isinstance(lrc, StepReport) and isinstance(naive, NaiveReport)
    losses, means = lrc.losses, lrc.losses.means(method_of(config))
    pairs = {
        "LM": (means["lm_loss"], naive.lm),
        "KL": (means["kl_loss"], naive.kl),
        "clone terms": ((losses.clone / losses.tokens).cpu(), naive.clone),
        "gradient norm": (lrc.grad_norm, naive.grad_norm),
    }
    found = {}
    for name, (first, second) in pairs.items():
        expected = torch.as_tensor(first, dtype=torch.float64)
        found[name] = (second.detach().double().cpu() / expected - 1).abs().max().item()
    return found


def _gemm_size(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 2048


def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of one large square matrix product: the best of some. What the machine gives a step at most."""
    size = _gemm_size(device)
    a, b, c = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    best = float("inf")
    for _ in range(20 if device.type == "cuda" else 3):
        seconds, _ = timed(lambda: torch.mm(a, b, out=c), device)
        best = min(best, seconds)
    return 2.0 * size**3 / best


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _explain_naive(device: torch.device) -> str:
    beside = "; its memory on the device is beside ours" if device.type == "cuda" else ""
    return (
        f"naive LRC has a process of its own, {torch.get_num_threads()} threads as ours, and the settings of malloc "
        f"and torch that a program starts with; it is idle while the others are measured{beside}"
    )


def _explain_bound(flops: StepFlops, ordinary: StepFlops, tokens: int) -> list[str]:
    """What is counted, in GFLOPs per token."""
    per_token = 1e-9 / tokens
    return [
        "FLOPs per token, in GFLOP, by matrix products: LRC "
        f"{flops.teacher_forward * per_token:.3g} teacher, {flops.student_forward * per_token:.3g} student forward, "
        f"{flops.student_backward * per_token:.3g} backward (both with o_T P_o and o_ffn_T P_down), "
        f"{flops.projections * per_token:.3g} compose and pull back; ordinary {ordinary.total * per_token:.3g}.",
        "The bound leaves compose and pull back out; shares of the GEMM peak count them, for naive LRC in every "
        "micro-batch.",
    ]


def _profile_lines(parts: dict[str, list[float]], flops: dict[str, float]) -> list[str]:
    totals = [sum(values) for values in zip(*parts.values(), strict=True)]
    rows = [["an LRC step, median (min-max)", "seconds", "share", "by FLOPs"]]
    for name, values in parts.items():
        shares = Spread.of([value / total for value, total in zip(values, totals, strict=True)])
        rows.append([name, Spread.of(values).text(3), shares.text(3), f"{flops[name] / sum(flops.values()):.3f}"])
    return ["", *table([*rows, ["all of it", Spread.of(totals).text(3), "", ""]])]
