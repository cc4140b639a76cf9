"""The page's words and tables: state, headline figures, losses, restarts, configuration."""

import math
import statistics
from collections.abc import Sequence
from datetime import datetime
from html import escape
from typing import Any

from megatron_lrc.config import describe_changes
from megatron_lrc.methods import method_of
from megatron_lrc.report.chart_axes import number
from megatron_lrc.report.curves import get
from megatron_lrc.report.run_files import RunFiles, parse_time
from megatron_lrc.train.progress import count, duration, gap_text

LOSS_ROWS = {
    "lm_loss": "LM loss",
    "teacher_lm_loss": "teacher's LM loss",
    "kl_loss": "KL loss",
    "clone_loss": "clone loss",
    "loss": "loss",
    "teacher_kl": "KL from the teacher",
    "top1_agreement": "top-1 agreement",
}


def header(run: RunFiles, now: datetime) -> str:
    """Title, state and how far it is."""
    steps = run.train_iters
    share = min(run.step / steps, 1.0) if steps else 0.0
    badge = '<span class="badge done">finished</span>' if run.is_finished else '<span class="badge">under way</span>'
    of = f"step {run.step:,} of {steps:,} ({100 * share:.1f}%)" if steps else f"step {run.step:,}"
    training = method_of(run.config).title if run.config else "Its configuration is not known"
    return (
        f"<header><h1>{escape(run.path.absolute().name)} {badge}</h1>"
        f'<p class="sub">{escape(training)}</p>'
        f'<div class="bar"><i style="width:{100 * share:.2f}%"></i></div>'
        f'<p class="sub">{of}{escape(_pace(run, now))}</p></header>'
    )


def _pace(run: RunFiles, now: datetime) -> str:
    """When the last record was written; how long the rest takes."""
    text, since = "", run.seconds_since(now)
    if since is not None:
        text += f" \u00b7 last record {duration(max(since, 0))} ago"
    if not run.is_finished and run.records and run.train_iters:
        paces = [get(record, "step_seconds") for record in run.records[-10:]]
        left = (run.train_iters - run.step) * statistics.median(paces)
        if math.isfinite(left):
            text += f" \u00b7 {duration(left)} of training left at the last records' pace"
    return text


def tiles(run: RunFiles) -> str:
    """The figures that are looked for first; of the last record unless they say otherwise."""
    last = run.records[-1] if run.records else {}
    valid = run.validations[-1] if run.validations else {}
    rate = get(last, "tokens_per_second")
    lost = f"{run.lost_steps} steps lost, {duration(run.lost_seconds)}" if run.lost_steps else "no step lost"
    found = [
        ("tokens", count(last["tokens"]) if last else "-", _wall(run)),
        ("LM loss", number(get(last, "lm_loss")), f"perplexity {_perplexity(get(last, 'lm_loss'))}"),
        ("validation LM loss", number(get(valid, "lm_loss")), _gap(run)),
        ("tokens per second", count(rate) if math.isfinite(rate) else "-", _effective(run)),
        _compute_tile(last),
        ("memory, peak", f"{number(get(last, 'memory_gib', 'peak'), 3)} GiB", "the rank with the most"),
        ("starts", str(len(run.starts)) if run.starts else "-", lost),
    ]
    return "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(more)}</small></div>'
        for name, value, more in found
        if value not in ("-", "- GiB")
    )


def _compute_tile(last: dict[str, Any]) -> tuple[str, str, str]:
    tflops = f"{number(get(last, 'tflops', 'total'), 3)} TFLOP/s per device"
    if math.isfinite(get(last, "mfu", "total")):
        return "MFU", f"{100 * get(last, 'mfu', 'total'):.1f}%", tflops
    return "TFLOP/s per device", number(get(last, "tflops", "total"), 3), "no peak known: no MFU"


def _wall(run: RunFiles) -> str:
    seconds = run.wall_seconds()
    return f"in {duration(seconds)} since the first start" if seconds else ""


def _effective(run: RunFiles) -> str:
    """Tokens per second since the first start, with everything that the training loop does not count."""
    seconds = run.wall_seconds()
    if not seconds or run.starts[0]["step"]:
        return ""
    return f"{count(run.records[-1]['tokens'] / seconds)} since the first start, all told"


def _gap(run: RunFiles) -> str:
    """How far the last validation has come from the first one to the teacher."""
    if not run.validations:
        return ""
    first, last = (get(record, "lm_loss") for record in (run.validations[0], run.validations[-1]))
    return gap_text(first, last, get(run.validations[-1], "teacher_lm_loss"))


def _perplexity(loss: float) -> str:
    return number(math.exp(loss), 4) if loss < 700 else "-"


def warnings(run: RunFiles) -> list[str]:
    """What was said of validations on the console, in their order."""
    return [f"Warning: {record['warning']}" for record in run.validations if isinstance(record.get("warning"), str)]


def losses(run: RunFiles) -> str:
    """First and last training record, first, best and last validation."""
    columns: list[tuple[str, dict[str, Any]]] = []
    if run.records:
        columns += [(f"train, step {record['step']:,}", record) for record in (run.records[0], run.records[-1])]
    if run.validations:
        finite = [record for record in run.validations if math.isfinite(get(record, "lm_loss"))]
        best = min(finite or run.validations, key=lambda record: get(record, "lm_loss"))
        named = (("first", run.validations[0]), ("best", best), ("last", run.validations[-1]))
        columns += [(f"{name} validation, step {record['step']:,}", record) for name, record in named]
    rows = [
        [title, *(number(get(record, key), 5) for _, record in columns)]
        for key, title in LOSS_ROWS.items()
        if any(math.isfinite(get(record, key)) for _, record in columns)
    ]
    rows.append(["perplexity", *(_perplexity(get(record, "lm_loss")) for _, record in columns)])
    return table(["", *(name for name, _ in columns)], rows) if columns else ""


def starts(run: RunFiles) -> str:
    """A row per start: what it went on from, what was lost, on what it ran."""
    rows = []
    for place, start in enumerate(run.starts):
        after = run.starts[place + 1] if place + 1 < len(run.starts) else None
        end = after["step"] + (after.get("lost_steps") or 0) if after else run.step
        layout, versions = start.get("layout") or {}, start.get("versions") or {}
        checkpoint = start.get("checkpoint")
        began = parse_time(start.get("time"))
        sizes = [f"{name.upper()} {size}" for name, size in layout.items() if size != 1]
        row = {
            "": str(place + 1),
            "started (UTC)": f"{began:%Y-%m-%d %H:%M:%S}" if began else "-",
            "from step": f"{start['step']:,}",
            "to step": f"{end:,}",
            "checkpoint": "/".join(str(checkpoint).replace("\\", "/").split("/")[-2:]) if checkpoint else "-",
            "lost steps": f"{start.get('lost_steps') or 0:,}",
            "lost time": duration(start.get("lost_seconds") or 0),
            "ranks": f"{start.get('world_size')} on {start.get('hosts')} host{'s' * (start.get('hosts') != 1)}",
            "layout": " x ".join(sizes) or "one rank",
            "versions": ", ".join(f"{name.replace('_', '-')} {text}" for name, text in versions.items() if text),
        }
        rows.append(row)
    return table(*names_and_cells(rows)) if rows else ""


def configuration(run: RunFiles) -> str:
    """What differs from the defaults, then everything."""
    if run.config is None:
        return f"<pre>{escape(run.config_text)}</pre>" if run.config_text else ""
    flags = "\n".join(describe_changes(run.config))
    sections = "".join(
        f"<h4>{escape(section)}</h4>{table(['', ''], [[key, _setting(value)] for key, value in values.items()])}"
        for section, values in run.config.to_dict().items()
    )
    return (
        f"<h3>Differs from the defaults</h3><pre>{escape(flags)}</pre>"
        f'<details><summary>All settings</summary><div class="sections">{sections}</div></details>'
    )


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def names_and_cells(rows: Sequence[dict[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Of a table whose rows are column -> cell, all with the same columns."""
    return list(rows[0]) if rows else [], [list(row.values()) for row in rows]


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A <table>; all text escaped. Without names no head."""
    head = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in names)}</tr></thead>" if any(names) else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
