"""Which runs a comparison needs: contestant x token budget x seed, before them a grid of learning rates if asked for.

Every run ends its learning-rate schedule at its own budget. A point "loss after t tokens" is thus the end of a run that
was planned for t tokens; the middle of a longer run, whose rate has not decayed yet, would be worse than what t tokens
can do. So ordinary training, whose need for tokens is asked, has one run per budget.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_lrc.comparison.ablations import with_layers
from megatron_lrc.comparison.contestant import Contestant
from megatron_lrc.comparison.contestants import ORDINARY
from megatron_lrc.comparison.material import Material
from megatron_lrc.comparison.scoring import Kind
from megatron_lrc.config import parse_config
from megatron_lrc.methods import method_of

#: Tokens of a micro-batch, where none is asked for: with these a student of SmolLM2-135M fits into 24 GB.
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Sizes:
    """What all runs share. tokens: of the budget that all contestants have (times 1). lengths in tokens."""

    student_hidden_size: int
    tokens: int
    seq_length: int
    global_batch_size: int  # sequences
    ordinary_times: float
    grid_times: float
    validations: int
    eval_iters: int
    flags: Sequence[str] = ()  # of the user's, for all
    micro_batch_size: int | None = None  # sequences

    @property
    def sequences_at_once(self) -> int:
        """As asked for, or the largest divisor of the batch of at most TOKENS_AT_ONCE tokens."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        most = max(1, TOKENS_AT_ONCE // self.seq_length)
        return max(size for size in range(1, most + 1) if self.global_batch_size % size == 0)

    def steps(self, times: float) -> int:
        """Exact multiples of the steps of one budget, as far as they are whole; none for no tokens."""
        if not times:
            return 0
        return max(1, round(times * max(1, round(self.tokens / (self.seq_length * self.global_batch_size)))))

    def tokens_of(self, times: float) -> int:
        return self.steps(times) * self.seq_length * self.global_batch_size

    def budgets(self, contestant: Contestant) -> list[float]:
        """In multiples of `tokens`: 1; for ordinary training 1, 2, 5, 10, ... up to its own."""
        if contestant.name != ORDINARY:
            return [1.0]
        usual = [factor * 10.0**power for power in range(6) for factor in (1, 2, 5)]
        return [*(times for times in usual if times < self.ordinary_times), self.ordinary_times]


@dataclass(frozen=True, slots=True)
class Run:
    """One training run. lr: from the grid, or None for the contestant's own. kind: of its student."""

    contestant: Contestant
    times: float
    seed: int
    lr: float | None
    tokens: int
    steps: int
    flags: tuple[str, ...]
    kind: Kind = "student"

    @property
    def name(self) -> str:
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        return f"{self.contestant.name}-x{self.times:g}-seed{self.seed}{rate}"


def make_run(
    contestant: Contestant, times: float, seed: int, lr: float | None, *, sizes: Sizes, material: Material
) -> Run:
    """A run with all its flags but --save. Order decides: the contestant's flags come after those of all."""
    steps = sizes.steps(times)
    batch, at_once = str(sizes.global_batch_size), str(sizes.sequences_at_once)
    flags = [
        *("--teacher", str(material.teacher), *material.data),
        *("--student-hidden-size", str(sizes.student_hidden_size), "--seq-length", str(sizes.seq_length)),
        *("--micro-batch-size", at_once, "--global-batch-size", batch, "--train-iters", str(steps)),
        *("--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.05", "--seed", str(seed)),
        *("--eval-interval", str(max(1, steps // sizes.validations)), "--eval-iters", str(sizes.eval_iters)),
        *("--log-interval", str(max(1, steps // 50)), "--save-interval", str(max(1, steps // 3)), "--keep-last", "1"),
        *sizes.flags,
        *shlex.split(with_layers(contestant.flags, material.num_layers)),
        *(() if lr is None else ("--lr", repr(lr))),
    ]
    method = method_of(parse_config(flags))
    kind = "clone" if method.has_projections and not method.changes else "student"
    return Run(contestant, times, seed, lr, sizes.tokens_of(times), steps, tuple(flags), kind)


def grid_runs(
    contestants: Sequence[Contestant], lrs: Sequence[float], seed: int, *, sizes: Sizes, material: Material
) -> list[Run]:
    """Every learning rate at one seed, for the budgets up to `grid_times`."""
    return [
        make_run(contestant, times, seed, lr, sizes=sizes, material=material)
        for contestant in contestants
        for times in sizes.budgets(contestant)
        if times <= sizes.grid_times
        for lr in lrs
    ]


def chosen_runs(
    contestants: Sequence[Contestant],
    seeds: Sequence[int],
    best: dict[tuple[str, float], float],
    *,
    sizes: Sizes,
    material: Material,
) -> list[Run]:
    """The runs that are compared. best: (contestant, times) -> learning rate; a budget that the grid left out takes
    that of the longest one in it."""
    runs = []
    for contestant in contestants:
        searched = sorted(times for name, times in best if name == contestant.name)
        for times in sizes.budgets(contestant):
            nearest = times if times in searched else (searched[-1] if searched else None)
            lr = best.get((contestant.name, nearest)) if nearest is not None else None
            runs += [make_run(contestant, times, seed, lr, sizes=sizes, material=material) for seed in seeds]
    return runs


def start_runs(contestants: Sequence[Contestant], seed: int, *, sizes: Sizes, material: Material) -> list[Run]:
    """Runs of no step, whose students are what the contestants start as. One for all that start alike; none for those
    whose student is cut later."""
    first: dict[tuple, list[Contestant]] = {}
    for one in contestants:
        config = parse_config(shlex.split(with_layers(one.flags, material.num_layers)))
        if config.model.method == "lrc":
            start = config.projection
            key = ("lrc", start.init, start.init_method_std, start.calibration_tokens, start.released_checkpoint)
        elif config.model.method == "sheared":
            continue
        else:
            key = ("new", config.projection.init_method_std)
        first.setdefault(key, []).append(one)
    starts = [replace(alike[0], about=f"start of {', '.join(one.name for one in alike)}") for alike in first.values()]
    return [make_run(one, 0.0, seed, None, sizes=sizes, material=material) for one in starts]
