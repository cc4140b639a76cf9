"""The comparison's charts: the same for the page and for curves.svg."""

import statistics
from collections.abc import Sequence

from megatron_lrc.comparison import results
from megatron_lrc.comparison.result_tables import Comparison
from megatron_lrc.comparison.results import ORDINARY, Group
from megatron_lrc.report.charts import COLORS, Chart, Series

_LEVEL_COLOR = 7  # grey


def charts(found: Comparison) -> list[Chart]:
    """Loss against tokens over all budgets; at the budget of all; and the learning rates that were tried."""
    ends, courses = _ends_of_runs(found.groups), _courses(found.groups)
    places = [x for one in (*ends, *courses) for x, _ in one.points]
    first = min((x for x in places if x > 0), default=1.0)
    equal = max(x for one in courses for x, _ in one.points)
    unit, grid_unit = "LM loss, nats per token; light areas: lowest to highest over seeds", "held-out LM loss, one seed"
    everything = [*ends, *courses, *_levels(found, first, max(places))]
    return [
        Chart("Held-out loss against tokens", unit, everything, is_x_log=True),
        Chart("The budget of all", unit, [*courses, *_levels(found, 1.0, equal)]),
        Chart("Learning rates tried", grid_unit, _grid(found), is_x_log=True, x_name="learning rate"),
    ]


def _ends_of_runs(groups: Sequence[Group]) -> list[Series]:
    """Of ordinary training, the ends of its runs of several lengths."""
    ends = sorted((one for one in groups if one.name == ORDINARY), key=lambda one: one.tokens)
    if len(ends) < 2:
        return []
    rows = [(one.tokens, one.losses) for one in ends]
    return [_series(f"{ORDINARY}, ends of runs", rows, _color(ORDINARY, groups), "dots")]


def _courses(groups: Sequence[Group]) -> list[Series]:
    """The course of every contestant's runs at the budget of all."""
    found = []
    for one in groups:
        by_tokens: dict[float, list[float]] = {}
        for result in one.results if one.times == 1 else ():
            for tokens, loss in result.points:
                by_tokens.setdefault(tokens, []).append(loss)
        if by_tokens:
            found.append(_series(one.name, sorted(by_tokens.items()), _color(one.name, groups), "line"))
    return found


def _color(name: str, groups: Sequence[Group]) -> int:
    names = list(dict.fromkeys(one.name for one in groups))
    return names.index(name) % len(COLORS)


def _series(name: str, rows: Sequence[tuple[float, Sequence[float]]], color: int, style: str) -> Series:
    """rows: (tokens, losses of the seeds)."""
    means = [(tokens, statistics.fmean(losses)) for tokens, losses in rows]
    return Series(name, means, color, style, [(tokens, min(losses), max(losses)) for tokens, losses in rows])


def _levels(found: Comparison, start: float, end: float) -> list[Series]:
    """The teacher's loss, for all places."""
    loss = found.teacher_loss
    return [] if loss is None else [Series("teacher", [(start, loss), (end, loss)], _LEVEL_COLOR, "dashed")]


def _grid(found: Comparison) -> list[Series]:
    """Loss against learning rate, of each contestant and budget for which several were tried."""
    lines = []
    for color, one in enumerate(results.group(found.grid)):
        points = sorted((r.outcome.run.lr, r.loss) for r in one.results if r.outcome.run.lr is not None)
        name = one.name if one.times == 1 else f"{one.name}, {one.times:g} times"
        lines.append(Series(name, points, color % len(COLORS), "dots"))
    return lines
