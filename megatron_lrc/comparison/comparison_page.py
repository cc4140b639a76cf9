"""report.html of a comparison: one file that asks nothing of the network, in the style of the page about a run."""

from datetime import datetime
from html import escape

from megatron_lrc import __version__
from megatron_lrc.comparison import figures
from megatron_lrc.comparison import result_tables as tables
from megatron_lrc.comparison.result_tables import Comparison
from megatron_lrc.report.charts import Chart, Series, draw
from megatron_lrc.report.run_page import document, section
from megatron_lrc.report.run_tables import table


def render(found: Comparison, now: datetime) -> str:
    """The page's HTML. now: UTC."""
    titled = tables.sections(found)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in tables.notes(found))
    made = f"megatron_lrc {__version__}, {now:%Y-%m-%d %H:%M:%S} UTC. All figures are in results.json."
    body = [
        f'<header><h1>Methods compared at equal tokens</h1><p class="sub">{escape(_subtitle(found))}</p></header>',
        section(titled[0][0], table(*titled[0][1]), notes),
        section("Curves", f'<div class="charts">{_charts(found)}</div>'),
        *(section(title, table(*rows)) for title, rows in titled[1:]),
        f"<footer><p>{escape(made)}</p></footer>",
    ]
    return document("Methods compared", body, steps=[])


def _subtitle(found: Comparison) -> str:
    names = list(dict.fromkeys(one.name for one in found.groups))
    return f"{len(names)} contestants, {len(found.seeds)} seed{'s' * (len(found.seeds) != 1)}: {', '.join(names)}"


def _charts(found: Comparison) -> str:
    lines = figures.curves(found.groups)
    series = [
        Series(
            one.name,
            [(tokens, mean) for tokens, mean, *_ in one.rows],
            one.color,
            "dots" if one.is_of_ends else "line",
            [(tokens, low, high) for tokens, _, low, high in one.rows],
        )
        for one in lines
    ]
    last = max(row[0] for one in lines for row in one.rows)
    equal = max(row[0] for one in lines if not one.is_of_ends for row in one.rows)
    levels, equal_levels = (
        [Series(name, [(1.0, loss), (end, loss)], 7, "dashed") for name, loss in figures.reference_lines(found)]
        for end in (last, equal)
    )
    first = min((row[0] for one in lines for row in one.rows if row[0] > 0), default=1.0)
    levels = [Series(one.name, [(first, one.points[0][1]), one.points[1]], one.color, one.style) for one in levels]
    courses = [one for one in series if one.style == "line"]
    grid = [Series(name, points, color, "dots") for name, points, color in figures.grid_curves(found)]
    unit = "LM loss, nats per token; light areas: lowest to highest over seeds"
    charts = [
        Chart("Held-out loss against tokens", unit, [*series, *levels], is_x_log=True),
        Chart("The budget of all", unit, [*courses, *equal_levels]),
        Chart("Learning rates tried", "held-out LM loss, one seed", grid, is_x_log=True, x_name="learning rate"),
    ]
    return "".join(map(draw, charts))
