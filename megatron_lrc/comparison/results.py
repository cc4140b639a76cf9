"""From finished runs to figures: losses over seeds, tokens to reach a loss, how many times the tokens another needs.

Held-out loss is `lm_loss` of validation.jsonl, in nats per token, on the same sequences for every run. Spread
is the lowest and the highest over seeds.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_lrc.comparison.contestants import ORDINARY
from megatron_lrc.comparison.runner import Outcome
from megatron_lrc.comparison.scoring import EVALUATION, read_evaluation
from megatron_lrc.train.jsonl import read_records

Point = tuple[float, float]  # (tokens, held-out loss)


@dataclass(frozen=True, slots=True)
class Reached:
    """Tokens to reach a loss. kind: `at` (between two measurements), `within` (already at the first: at most
    these tokens), `never` (not by the last: more than these tokens)."""

    tokens: float
    kind: str = "at"


def tokens_to_reach(points: Sequence[Point], loss: float) -> Reached:
    """Where the curve first is at `loss` or below: between two points by proportion of the loss on log
    tokens, since losses fall about evenly with the logarithm. points: ascending by tokens, at least one above
    0."""
    if points[0][0] <= 0 and points[0][1] > loss:
        points = points[1:]  # before the first step there is no logarithm
    for place, (tokens, value) in enumerate(points):
        if value > loss:
            continue
        if place == 0:
            return Reached(tokens, "at" if value == loss and tokens > 0 else "within")
        before, higher = points[place - 1]
        share = (higher - loss) / (higher - value)
        return Reached(math.exp(math.log(before) + share * (math.log(tokens) - math.log(before))))
    return Reached(points[-1][0], "never")


@dataclass(frozen=True, slots=True)
class Result:
    """One finished run. points: its validations. tokens_per_second: median of its records, the first left out.

    last: the last validation's record. evaluation: what its student has been scored on (`scoring.py`).
    """

    outcome: Outcome
    points: tuple[Point, ...]
    tokens_per_second: float
    seconds: float  # of training steps
    teacher_loss: float | None
    versions: dict[str, Any]
    last: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return self.points[-1][1]


def read_result(outcome: Outcome) -> Result:
    """Of a run that has finished. A loss that was not finite, and is null in the file, counts as infinite."""
    validations = list(read_records(outcome.directory / "validation.jsonl"))
    records = list(read_records(outcome.directory / "metrics.jsonl"))
    starts = list(read_records(outcome.directory / "starts.jsonl"))
    steps, seconds = 0, 0.0
    for record in records:
        seconds += (record["step"] - steps) * record["step_seconds"]
        steps = record["step"]
    rates = [record["tokens_per_second"] for record in records]
    teacher = validations[-1].get("teacher_lm_loss")
    return Result(
        outcome,
        tuple((record["tokens"], _number(record.get("lm_loss"))) for record in validations),
        statistics.median(rates[1:] or rates) if rates else math.nan,
        seconds,
        teacher,
        starts[-1].get("versions", {}) if starts else {},
        validations[-1],
        read_evaluation(outcome.directory / EVALUATION),
    )


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def best_rates(results: Sequence[Result]) -> dict[tuple[str, float], float]:
    """(contestant, times) -> the learning rate of the grid that ended with the lowest held-out loss."""
    best: dict[tuple[str, float], Result] = {}
    for result in results:
        key = (result.outcome.run.contestant.name, result.outcome.run.times)
        if key not in best or result.loss < best[key].loss:
            best[key] = result
    return {key: result.outcome.run.lr for key, result in best.items() if result.outcome.run.lr is not None}


@dataclass(frozen=True, slots=True)
class Group:
    """The finished runs of one contestant at one budget, by seed."""

    name: str
    about: str
    times: float
    tokens: int
    results: tuple[Result, ...]

    @property
    def losses(self) -> list[float]:
        return [result.loss for result in self.results]

    @property
    def first_losses(self) -> list[float]:
        """Before the first step; empty where that was not measured."""
        return [result.points[0][1] for result in self.results if result.points[0][0] == 0]

    @property
    def rates(self) -> list[float]:
        return [result.tokens_per_second for result in self.results]


def group(results: Sequence[Result]) -> list[Group]:
    """In the order in which contestant and budget first occur."""
    groups: dict[tuple[str, float], list[Result]] = {}
    for result in results:
        run = result.outcome.run
        groups.setdefault((run.contestant.name, run.times), []).append(result)
    return [
        Group(name, found[0].outcome.run.contestant.about, times, found[0].outcome.run.tokens, tuple(found))
        for (name, times), found in groups.items()
    ]


def ordinary_points(groups: Sequence[Group], seed: int) -> list[Point]:
    """What ordinary training reached at each of its budgets with this seed: ends of runs planned for that long."""
    ordinary = [(one, result) for one in groups if one.name == ORDINARY for result in one.results]
    return sorted((float(one.tokens), result.loss) for one, result in ordinary if result.outcome.run.seed == seed)


def ratios(one: Group, groups: Sequence[Group]) -> list[Reached]:
    """By seed: tokens that ordinary training needs to reach this contestant's final loss, over the contestant's own."""
    found = []
    for result in one.results:
        points = ordinary_points(groups, result.outcome.run.seed)
        if points:
            reached = tokens_to_reach(points, result.loss)
            found.append(replace(reached, tokens=reached.tokens / one.tokens))
    return found


def own_tokens(one: Group, groups: Sequence[Group], loss: float) -> list[Reached]:
    """By seed: tokens to reach `loss`. Of ordinary training by the ends of its runs; of the others, which
    have one budget, along the run, where the learning rate has not decayed yet: they might need fewer."""
    if one.name == ORDINARY:
        return [tokens_to_reach(ordinary_points(groups, r.outcome.run.seed), loss) for r in one.results]
    return [tokens_to_reach(result.points, loss) for result in one.results]


def default_target(groups: Sequence[Group]) -> float:
    """The mean loss of ordinary training at the budget of all; without it the worst contestant's."""
    ordinary = [statistics.fmean(one.losses) for one in groups if one.name == ORDINARY and one.times == 1]
    return ordinary[0] if ordinary else max((statistics.fmean(one.losses) for one in groups), default=math.inf)


# ----------------------------------------------------------------------------------------------------------- as text


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Mean, and the lowest and the highest where there are several."""
    mean = show(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({show(min(values))} to {show(max(values))})"


def spread_reached(values: Sequence[Reached], show: Callable[[float], str]) -> str:
    """As `spread` if each was reached at a known place; else the bounds that the seeds imply."""
    if not values:
        return "-"
    if all(value.kind == "at" for value in values):
        return spread([value.tokens for value in values], show)
    if all(value.kind == "never" for value in values):
        return f"never within the run: above {show(min(value.tokens for value in values))}"
    if all(value.kind == "within" for value in values):
        most = max(value.tokens for value in values)
        return f"at most {show(most)}" if most else "0, before training"
    signs = {"at": "", "never": "above ", "within": "at most "}
    return "by seed: " + ", ".join(signs[value.kind] + show(value.tokens) for value in values)
