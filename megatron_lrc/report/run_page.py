"""The whole page, as one HTML text that asks nothing of the network."""

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path

from megatron_lrc import __version__
from megatron_lrc.config import ConfigError
from megatron_lrc.report import evaluations as scored
from megatron_lrc.report import run_tables as tables
from megatron_lrc.report.charts import COLORS
from megatron_lrc.report.curves import Curves
from megatron_lrc.report.run_files import RunFiles, read_run
from megatron_lrc.report.thinning import RULE
from megatron_lrc.whole_files import write_whole

HERE = Path(__file__).parent

HEAT_NOTE = (
    "Each layer's clone loss, by term: layers from top (0) to bottom, tokens from left to right, colours by "
    "the logarithm on a scale of each term's own."
)
MACHINE_NOTE = (
    "Throughput is that of the training loop, without validations and saving. Parts are the FLOPs that the "
    "method needs, over the time of the whole step, so that they add up; recomputation is not counted."
)
RESTART_NOTE = "Dashed lines in the charts are restarts."


def write_report(run_directory: Path, output: Path | None) -> Path:
    """Write the page about a run; RUN/report.html by default. The file appears whole or not at all."""
    output = output or run_directory / "report.html"
    text = render(read_run(run_directory), datetime.now(timezone.utc))
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: its folder does not exist. Make it, or give another file.")
    write_whole(output, text)
    return output


def render(run: RunFiles, now: datetime) -> str:
    """The page's HTML. now: the time of the report, UTC."""
    curves = Curves(run)
    body = [
        tables.header(run, now),
        f'<div class="tiles">{tables.tiles(run)}</div>',
        *(f'<p class="note">{escape(note)}</p>' for note in run.notes),
        *(f'<p class="note">{escape(warning)}</p>' for warning in tables.warnings(run)),
        "" if run.records else '<p class="note">There is no training record yet.</p>',
        section("Losses", _div("charts", curves.losses()), tables.losses(run)),
        section("Evaluations", _div("charts", scored.charts(run)), scored.table_of(run), note=scored.NOTE),
        section("Clone loss by layer", _div("heats", curves.heat_maps()), note=HEAT_NOTE),
        section("Learning rate and gradients", _div("charts", curves.optimization())),
        section("Throughput and memory", _div("charts", curves.machine()), note=MACHINE_NOTE),
        section("Effective rank", _div("charts", curves.effective_rank())),
        section("Starts", tables.starts(run), note=RESTART_NOTE if run.starts[1:] else ""),
        section("Configuration", tables.configuration(run)),
        f"<footer><p>{escape(RULE)}</p><p>megatron_lrc {escape(__version__)}, {now:%Y-%m-%d %H:%M:%S} UTC, "
        f"from {escape(str(run.path.absolute()))}</p></footer>",
    ]
    return document(run.path.absolute().name, body, steps=_tokens_and_steps(run))


def document(title: str, body: Sequence[str], *, steps: list[list[int]]) -> str:
    """A page of these parts, with the style and the scripts in it. steps: some (tokens, step), or none."""
    place = escape(json.dumps(steps, separators=(",", ":")))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{_read('page.css')}{_color_rules()}</style></head>\n"
        f'<body data-steps="{place}">\n'
        + "\n".join(part for part in body if part)
        + f"\n<script>\n{_read('page.js')}</script></body></html>\n"
    )


def section(title: str, *parts: str, note: str = "") -> str:
    """A titled part of a page; nothing if it has no content."""
    content = "".join(parts)
    if not content:
        return ""
    words = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{words}{content}</section>"


def _div(name: str, figures: list[str]) -> str:
    return f'<div class="{name}">{"".join(figures)}</div>' if any(figures) else ""


def _color_rules() -> str:
    """s: stroke, f: fill, b: background, by number."""
    return "".join(
        f".s{place} {{ stroke: {color}; }} .f{place} {{ fill: {color}; }} "
        f".b{place} {{ background: {color}; --c: {color}; }}\n"
        for place, color in enumerate(COLORS)
    )


def _tokens_and_steps(run: RunFiles) -> list[list[int]]:
    """Some (tokens, step), from which the scripts tell the step of a place on the axis."""
    every = max(1, len(run.records) // 100)
    chosen = [*run.records[::every], *run.records[-1:]]
    return [[0, 0], *([record["tokens"], record["step"]] for record in chosen)]


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
