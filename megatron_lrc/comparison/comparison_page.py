"""report.html of a comparison: one file that asks nothing of the network, in the style of the page about a run."""

from datetime import datetime
from html import escape

from megatron_lrc import __version__
from megatron_lrc.comparison import figures
from megatron_lrc.comparison import result_tables as tables
from megatron_lrc.comparison.result_tables import Comparison
from megatron_lrc.report.charts import draw
from megatron_lrc.report.run_page import document, section
from megatron_lrc.report.run_tables import table


def render(found: Comparison, now: datetime) -> str:
    """The page's HTML. now: UTC."""
    titled, names = tables.sections(found), list(dict.fromkeys(one.name for one in found.groups))
    seeds = f"{len(found.seeds)} seed{'s' * (len(found.seeds) != 1)}"
    subtitle = escape(f"{len(names)} contestants, {seeds}: {', '.join(names)}")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in tables.notes(found))
    made = f"megatron_lrc {__version__}, {now:%Y-%m-%d %H:%M:%S} UTC. All figures are in results.json."
    body = [
        f'<header><h1>Methods compared at equal tokens</h1><p class="sub">{subtitle}</p></header>',
        section(titled[0][0], table(*titled[0][1]), notes),
        section("Curves", f'<div class="charts">{"".join(map(draw, figures.charts(found)))}</div>'),
        *(section(title, table(*rows)) for title, rows in titled[1:]),
        f"<footer><p>{escape(made)}</p></footer>",
    ]
    return document("Methods compared", body, steps=[])
