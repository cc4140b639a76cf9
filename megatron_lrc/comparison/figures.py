"""The comparison's charts: the same curves for the page (inline SVG, `report/charts.py`) and for curves.png
(matplotlib, an optional dependency)."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lrc.comparison import results
from megatron_lrc.comparison.result_tables import Comparison
from megatron_lrc.comparison.results import ORDINARY, Group
from megatron_lrc.config import ConfigError
from megatron_lrc.report.run_page import COLORS


@dataclass(frozen=True, slots=True)
class Curve:
    """rows: (tokens, mean, lowest, highest over seeds), ascending. is_of_ends: ends of runs, not one run's course."""

    name: str
    rows: list[tuple[float, float, float, float]]
    color: int
    is_of_ends: bool = False


def check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "curves.png is drawn with matplotlib, which is not installed. Run pip install 'megatron-lrc[compare]', or "
            "give --no-png."
        ) from None


def curves(groups: Sequence[Group]) -> list[Curve]:
    """The course of every contestant's runs at the budget of all; of ordinary training also the ends of its runs."""
    found = []
    names = list(dict.fromkeys(one.name for one in groups))
    ends = [one for one in groups if one.name == ORDINARY]
    if len(ends) > 1:
        rows = [_row(one.tokens, one.losses) for one in sorted(ends, key=lambda one: one.tokens)]
        found.append(Curve(f"{ORDINARY}, ends of runs", rows, names.index(ORDINARY), True))
    for one in groups:
        if one.times == 1:
            found.append(Curve(one.name, _course(one), names.index(one.name)))
    return [Curve(one.name, one.rows, one.color % len(COLORS), one.is_of_ends) for one in found]


def _course(one: Group) -> list[tuple[float, float, float, float]]:
    by_tokens: dict[float, list[float]] = {}
    for result in one.results:
        for tokens, loss in result.points:
            by_tokens.setdefault(tokens, []).append(loss)
    return [_row(tokens, losses) for tokens, losses in sorted(by_tokens.items())]


def _row(tokens: float, losses: Sequence[float]) -> tuple[float, float, float, float]:
    return tokens, statistics.fmean(losses), min(losses), max(losses)


def draw_png(found: Comparison, path: Path) -> None:
    """Three panels: loss against tokens, loss at equal tokens, tokens per second; each with its spread over seeds."""
    from matplotlib.figure import Figure

    lines = curves(found.groups)
    equal = [one for one in found.groups if one.times == 1]
    colors = [COLORS[index % len(COLORS)] for index in _colors(equal, found.groups)]
    height = max(5.0, 1.5 + 0.3 * len(equal))
    figure = Figure(figsize=(15, height), layout="constrained")
    loss, bars, speed = figure.subplots(1, 3, width_ratios=[1.9, 1, 0.8])
    for one in lines:
        # Before the first step there is no place on a logarithmic axis.
        tokens, mean, low, high = zip(*(row for row in one.rows if row[0] > 0), strict=True)
        style = {"marker": "o", "markersize": 5} if one.is_of_ends else {}
        label = f"{one.name} ({mean[-1]:.3f})"
        loss.plot(tokens, mean, color=COLORS[one.color], label=label, ls="--" if one.is_of_ends else "-", **style)
        loss.fill_between(tokens, low, high, color=COLORS[one.color], alpha=0.2, linewidth=0)
    if found.teacher_loss is not None:
        loss.axhline(found.teacher_loss, color="#555", lw=1, ls=":", label=f"teacher ({found.teacher_loss:.3f})")
    loss.set(xscale="log", xlabel="training tokens", ylabel="held-out LM loss, nats per token", title="Loss and tokens")
    loss.legend(fontsize=8)
    _dots(bars, equal, [one.losses for one in equal], colors, title="Held-out loss at equal tokens", form="{:.3f}")
    _dots(speed, equal, [one.rates for one in equal], colors, title="Tokens per second", form="{:,.0f}", from_zero=True)
    speed.set_yticklabels([])
    for axis in (loss, bars, speed):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    kinds = f"seeds: {', '.join(map(str, found.seeds))}; shaded and whiskers: lowest and highest over seeds"
    figure.suptitle(kinds, fontsize=9, color="#555")
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)


def _colors(groups: Sequence[Group], everyone: Sequence[Group]) -> list[int]:
    names = list(dict.fromkeys(one.name for one in everyone))
    return [names.index(one.name) for one in groups]


def _dots(axis, groups: Sequence[Group], values: list[list[float]], colors: list[str], *, title, form, from_zero=False):
    """Mean as a dot with its figure, lowest to highest as a line, every seed as a tick; first contestant on top."""
    for place, (found, color) in enumerate(zip(values, colors, strict=True)):
        finite = [value for value in found if math.isfinite(value)]
        if not finite:
            continue
        mean = statistics.fmean(finite)
        axis.plot([min(finite), max(finite)], [place, place], color=color, lw=2)
        axis.plot(finite, [place] * len(finite), "|", color=color, ms=9)
        axis.plot([mean], [place], "o", color=color)
        axis.annotate(form.format(mean), (mean, place), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axis.set(title=title, yticks=range(len(groups)), yticklabels=[one.name for one in groups])
    axis.set_ylim(len(groups) - 0.5, -0.7)
    axis.margins(x=0.15)
    if from_zero:
        axis.set_xlim(left=0)


def reference_lines(found: Comparison) -> list[tuple[str, float]]:
    """(name, loss) of what is drawn as a level."""
    return [] if found.teacher_loss is None else [("teacher", found.teacher_loss)]


def grid_curves(found: Comparison) -> list[tuple[str, list[tuple[float, float]], int]]:
    """(name, (learning rate, loss) ascending, colour) of the learning-rate grid."""
    lines = []
    for color, one in enumerate(results.group(found.grid)):
        points = sorted((r.outcome.run.lr, r.loss) for r in one.results if r.outcome.run.lr is not None)
        name = one.name if one.times == 1 else f"{one.name}, {one.times:g} times"
        lines.append((name, points, color % len(COLORS)))
    return lines
