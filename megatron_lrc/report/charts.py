"""Charts as SVG: inline in a page here, as a file of their own in `chart_files.py`.

In a page a chart is whole without scripts; with them the pointer reads values off (`page.js`).
"""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape

from megatron_lrc.report import png
from megatron_lrc.report.chart_axes import Axis, number, tick_text
from megatron_lrc.report.thinning import Point, average_rows, kept_indices, thin

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 30
INNER_WIDTH, INNER_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

#: Of curves; readable on white and on black.
COLORS = (
    *("#3a7fd9", "#e2803a", "#2d9d70", "#c9475f", "#8c62d4"),
    *("#93744a", "#d367b0", "#7d8590", "#a59a1c", "#1fa2b5"),
)


@dataclass(frozen=True, slots=True)
class Series:
    """A curve: points in ascending order; color: its number in the page's palette. NaN is left out.

    band: (x, low, high) of a spread round the curve, drawn as a light area.
    """

    name: str
    points: Sequence[Point]
    color: int
    style: str = "line"  # line, dashed, or dots joined by a line
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """One panel. marks: places on the x axis to draw a vertical line at (restarts)."""

    title: str
    unit: str
    series: Sequence[Series]
    is_log: bool = False
    is_x_log: bool = False  # places at or below 0 are left out
    from_zero: bool = False
    is_stacked: bool = False
    x_name: str = "tokens"
    marks: Sequence[float] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Plot:
    """A chart with its places on paper. svg: what stands within the WIDTH x HEIGHT of its frame."""

    series: Sequence[Series]
    x_axis: Axis
    svg: str


def plot(chart: Chart) -> Plot | None:
    """Thins the curves, lays out the axes and draws; None if the chart has no finite value."""
    given = [_on_paper(one) for one in chart.series] if chart.is_x_log else chart.series
    given = [one for one in given if any(math.isfinite(y) for _, y in one.points)]
    if not given:
        return None
    if chart.is_stacked:
        series, bands = _stack(given)
    else:
        series = [replace(one, points=thin(_finite(one.points))) for one in given]
        bands = []
    x_axis = _exact_axis([x for one in series for x, _ in one.points], is_log=chart.is_x_log)
    values = [y for one in series for _, y in one.points] + [y for band in bands for _, y in band.points]
    values += [y for one in series for _, *both in one.band for y in both]
    y_axis = Axis.around(values, is_log=chart.is_log, from_zero=chart.from_zero or chart.is_stacked)
    parts = [_grid(chart, x_axis, y_axis)]
    parts += [_area(bands[place - 1] if place else None, band, x_axis, y_axis) for place, band in enumerate(bands)]
    if not bands:
        parts += [_band(one, x_axis, y_axis) for one in series]
        parts += [_curve(one, x_axis, y_axis) for one in series]
    return Plot(series, x_axis, "".join(parts))


def draw(chart: Chart) -> str:
    """The chart as a <figure> of a page; nothing if it has no finite value."""
    drawn = plot(chart)
    if drawn is None:
        return ""
    data = [
        {"n": one.name, "c": one.color}
        | {axis: _rounded(point[place] for point in one.points) for place, axis in enumerate("xy")}
        for one in drawn.series
    ]
    x_axis = drawn.x_axis
    frame = {"x0": x_axis.low, "x1": x_axis.high, "l": LEFT / WIDTH, "r": 1 - RIGHT / WIDTH, "x": chart.x_name}
    frame |= {"log": 1} if x_axis.is_log else {}
    return (
        f'<figure class="chart" data-frame="{_attribute(frame)}" data-series="{_attribute(data)}">'
        f"<figcaption><b>{escape(chart.title)}</b> <span>{escape(chart.unit)}</span></figcaption>"
        f"{_legend(drawn.series)}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">{drawn.svg}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg></figure>'
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _on_paper(series: Series) -> Series:
    """Without what has no place on a logarithmic x axis."""
    points, band = ([row for row in rows if row[0] > 0] for rows in (series.points, series.band))
    return replace(series, points=points, band=band)


def _exact_axis(values: list[float], *, is_log: bool = False) -> Axis:
    low, high = min(values), max(values)
    if is_log:
        return Axis(low, high, True) if high > low else Axis(low / 2, high * 2, True)
    return Axis(low, high) if high > low else Axis(low - 0.5, high + 0.5)


def _stack(given: Sequence[Series]) -> tuple[list[Series], list[Series]]:
    """(what each is by itself, what lies under its upper edge), at the same places: all have the same x values."""
    totals = [sum(point[1] for point in points) for points in zip(*(one.points for one in given), strict=True)]
    places = [place for place in kept_indices(totals) if math.isfinite(totals[place])]
    alone = [Series(one.name, [one.points[place] for place in places], one.color) for one in given]
    bands, below = [], [0.0] * len(places)
    for one in alone:
        below = [height + y for height, (_, y) in zip(below, one.points, strict=True)]
        bands.append(Series(one.name, [(x, h) for (x, _), h in zip(one.points, below, strict=True)], one.color))
    return alone, bands


def _at(point: Point, x_axis: Axis, y_axis: Axis) -> tuple[float, float] | None:
    x, y = x_axis.place(point[0]), y_axis.place(point[1])
    return None if x is None or y is None else (LEFT + x * INNER_WIDTH, TOP + (1 - y) * INNER_HEIGHT)


def _curve(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    places = [place for point in series.points if (place := _at(point, x_axis, y_axis))]
    style = ' stroke-dasharray="5 4"' if series.style == "dashed" else ""
    text = f'<path class="curve s{series.color}" d="{_path(places)}"{style}/>' if len(places) > 1 else ""
    if series.style == "dots" or len(places) == 1:
        text += "".join(f'<circle class="f{series.color}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places)
    return text


def _band(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    """The spread as a light area; a line up and down where it is at one place only."""
    rows = [row for row in series.band if all(map(math.isfinite, row))]
    ends = [(x, low) for x, low, _ in rows] + [(x, high) for x, _, high in reversed(rows)]
    outline = [place for point in ends if (place := _at(point, x_axis, y_axis))]
    if len(rows) == 1 and len(outline) == 2:
        return f'<path class="curve s{series.color}" d="{_path(outline)}"/>'
    return f'<path class="band f{series.color}" d="{_path(outline)}Z"/>' if outline else ""


def _area(below: Series | None, above: Series, x_axis: Axis, y_axis: Axis) -> str:
    floor = below.points if below else [(x, 0.0) for x, _ in above.points]
    outline = [place for point in [*above.points, *reversed(floor)] if (place := _at(point, x_axis, y_axis))]
    return f'<path class="area f{above.color}" d="{_path(outline)}Z"/>'


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _grid(chart: Chart, x_axis: Axis, y_axis: Axis) -> str:
    bottom, parts = HEIGHT - BOTTOM, []
    for tick in y_axis.ticks():
        y = TOP + (1 - (y_axis.place(tick) or 0.0)) * INNER_HEIGHT
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick_text(tick)}</text>')
    for tick in x_axis.ticks(6):
        x = LEFT + (x_axis.place(tick) or 0.0) * INNER_WIDTH
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{tick_text(tick)}</text>')
    for mark in chart.marks:
        place = x_axis.place(mark)
        if place is not None and 0 <= place <= 1:
            x = LEFT + place * INNER_WIDTH
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
    parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(chart.x_name)}</text>'
    )
    return "".join(parts)


def _legend(series: Sequence[Series]) -> str:
    entries = [
        f'<li><i class="b{one.color}{" dashed" if one.style == "dashed" else ""}"></i>{escape(one.name)} '
        f"<b>{number(one.points[-1][1])}</b></li>"
        for one in series
    ]
    return f'<ul class="legend">{"".join(entries)}</ul>'


# ------------------------------------------------------------------------------------------------------- heat maps


def draw_heat_map(title: str, rows: Sequence[Sequence[float]], bounds: tuple[float, float]) -> str:
    """Layers from top to bottom, time from left to right; colours by the logarithm. rows: a row of layers per record.

    bounds: tokens at the left and at the right edge. Nothing if no value is above 0.
    """
    columns = average_rows(rows)
    layers = max((len(column) for column in columns), default=0)
    table = [[column[layer] if layer < len(column) else math.nan for column in columns] for layer in range(layers)]
    logs = [math.log10(value) for row in table for value in row if math.isfinite(value) and value > 0]
    if not logs:
        return ""
    low, high = min(logs), max(logs)
    levels = [bytes(_level(value, low, high) for value in row) for row in table]
    image, plain = (base64.b64encode(data).decode() for data in (png.encode(levels), b"".join(levels)))
    frame = {"w": len(columns), "h": layers, "lo": low, "hi": high, "x0": bounds[0], "x1": bounds[1]}
    bar = base64.b64encode(png.encode([bytes(range(png.LEVELS))])).decode()
    return (
        f'<figure class="heat" data-frame="{_attribute(frame)}" data-levels="{plain}">'
        f"<figcaption><b>{escape(title)}</b></figcaption>"
        f'<div class="map"><div class="layers"><span>0</span><span>{layers - 1}</span></div>'
        f'<img alt="{escape(title)}: layers by tokens" src="data:image/png;base64,{image}"></div>'
        f'<div class="scale"><span>{number(10**low, 3)}</span><img alt="" src="data:image/png;base64,{bar}">'
        f"<span>{number(10**high, 3)}</span></div></figure>"
    )


def _level(value: float, low: float, high: float) -> int:
    if not math.isfinite(value) or value <= 0:
        return png.NOTHING
    share = (math.log10(value) - low) / (high - low) if high > low else 0.5
    return round(share * (png.LEVELS - 1))


def _rounded(values) -> list[float]:
    return [float(f"{value:.5g}") if value != int(value) or abs(value) >= 1e15 else int(value) for value in values]


def _attribute(value: object) -> str:
    return escape(json.dumps(value, separators=(",", ":")))
