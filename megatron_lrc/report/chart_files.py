"""Charts as one SVG file: whole without a page or scripts, legible on white and on dark."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_lrc.report.chart_axes import number
from megatron_lrc.report.charts import COLORS, HEIGHT, LEFT, RIGHT, WIDTH, Chart, Series, plot
from megatron_lrc.whole_files import write_whole

COLUMNS, GAP, TITLE, CAPTION, LINE = 2, 26, 44, 22, 17  # pixels but for the first; LINE: of a legend
_CHARACTER, _SWATCH = 6.6, 22  # the mean width of a legend's characters; room for the stroke before its words

#: Light, and what differs where the reader prefers dark. No CSS variables: few viewers but browsers know them.
_STYLE = """text { font: 11.5px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #626a76; }
.paper { fill: #fff; } .ink { fill: #1d2129; font-weight: 600; } .title { font-size: 15px; }
.grid { stroke: #eceef1; } .base, .tick { stroke: #b9bfc8; } .mark { stroke: #b9bfc8; stroke-dasharray: 2 3; }
.curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.area { opacity: .8; } .band { opacity: .18; }
@media (prefers-color-scheme: dark) {
  text { fill: #98a1ae; } .paper { fill: #1b1f26; } .ink { fill: #e4e7ec; }
  .grid { stroke: #2f3640; } .base, .tick, .mark { stroke: #59616d; } }
"""


def write_charts(path: Path, charts: Sequence[Chart], *, title: str, note: str = "") -> None:
    """Write the charts, two in a row; those without a finite value are left out. The file is whole or absent.

    note: a line in small print beside the title.
    """
    panels = [panel for chart in charts if (panel := _panel(chart))]
    parts, top = [], float(TITLE)
    for start in range(0, len(panels), COLUMNS):
        row = panels[start : start + COLUMNS]
        above = max(height for height, _, _ in row)
        for column, (_, legend, inner) in enumerate(row):
            left = GAP + column * (WIDTH + GAP)
            parts.append(f'<g transform="translate({left} {top})">{legend}</g>')
            parts.append(f'<g transform="translate({left} {top + above})">{inner}</g>')
        top += above + HEIGHT + GAP
    width = GAP + min(COLUMNS, max(len(panels), 1)) * (WIDTH + GAP)
    rules = "".join(f".s{n} {{ stroke: {c}; }} .f{n} {{ fill: {c}; }}\n" for n, c in enumerate(COLORS))
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top:g}" '
        f'width="{width}" height="{top:g}" role="img" aria-label="{escape(title)}">\n<style>{_STYLE}{rules}</style>\n'
        f'<rect class="paper" width="{width}" height="{top:g}"/>\n'
        f'<text x="{GAP}" y="27"><tspan class="ink title">{escape(title)}</tspan>'
        f'<tspan dx="12">{escape(note)}</tspan></text>\n' + "\n".join(parts) + "\n</svg>\n"
    )
    write_whole(path, text)


def _panel(chart: Chart) -> tuple[float, str, str] | None:
    """(height of what stands above the chart, that, the chart); None if there is nothing to draw."""
    drawn = plot(chart)
    if drawn is None:
        return None
    caption = f'<text x="{LEFT}" y="12"><tspan class="ink">{escape(chart.title)}</tspan>'
    caption += f'<tspan dx="6">{escape(chart.unit)}</tspan></text>'
    lines = _legend_lines(drawn.series)
    heights = [CAPTION + 10 + place * LINE for place in range(len(lines))]
    entries = [_entry(one, x, y) for line, y in zip(lines, heights, strict=True) for one, x in line]
    return CAPTION + LINE * len(lines), caption + "".join(entries), drawn.svg


def _legend_lines(series: Sequence[Series]) -> list[list[tuple[Series, float]]]:
    """(curve, where its entry begins), in lines that are no wider than the chart."""
    lines: list[list[tuple[Series, float]]] = [[]]
    x = float(LEFT)
    for one in series:
        width = _SWATCH + _CHARACTER * (len(one.name) + 1 + len(number(one.points[-1][1]))) + 14
        if lines[-1] and x + width > WIDTH - RIGHT:
            lines.append([])
            x = float(LEFT)
        lines[-1].append((one, x))
        x += width
    return lines


def _entry(series: Series, x: float, y: float) -> str:
    """A stroke as the curve is drawn, its name and its last value."""
    dashes = ' stroke-dasharray="5 4"' if series.style == "dashed" else ""
    dot = f'<circle class="f{series.color}" cx="{x + 8:.1f}" cy="{y - 4}" r="2.6"/>' * (series.style == "dots")
    return (
        f'<path class="curve s{series.color}" d="M{x:.1f} {y - 4}h16"{dashes}/>{dot}'
        f'<text x="{x + _SWATCH:.1f}" y="{y}">{escape(series.name)} '
        f'<tspan class="ink">{number(series.points[-1][1])}</tspan></text>'
    )
