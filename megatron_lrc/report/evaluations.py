"""What `evaluate --watch` has found of a run's checkpoints: a table, and charts over tokens."""

from collections.abc import Iterator
from typing import Any

from megatron_lrc.report.chart_axes import number
from megatron_lrc.report.charts import COLORS, Chart, Series, draw
from megatron_lrc.report.curves import get, points
from megatron_lrc.report.run_files import RunFiles
from megatron_lrc.report.run_tables import names_and_cells, table
from megatron_lrc.train.progress import count

NOTE = (
    "Checkpoints that evaluate --watch has scored. After +- stands a standard error; bits per byte are those of the "
    "right answer, lower is better."
)
HELDOUT_ROWS = {"lm_loss": "LM loss", "kl": "KL from the teacher", "top1_agreement": "top-1 agreement"}


def charts(run: RunFiles) -> list[str]:
    """Held-out LM loss of each text; of each task its score and bits per byte."""
    records, names = run.evaluations, _names(run, "tasks", "scores")
    heldout = [(text, ("heldout", text, "lm_loss")) for text in _names(run, "heldout")]
    scores = [(name, ("tasks", "scores", name)) for name in names]
    bits = [(name, ("tasks", "bits_per_byte", name)) for name in names]
    return [
        _chart(records, "Held-out LM loss", "nats per token", heldout),
        _chart(records, "Tasks", "score", scores),
        _chart(records, "Tasks: bits per byte", "of the right answer", bits),
    ]


def _chart(records: list[dict[str, Any]], title: str, unit: str, curves: list[tuple[str, tuple[str, ...]]]) -> str:
    series = [
        Series(name, points(records, *keys), place % len(COLORS), "dots") for place, (name, keys) in enumerate(curves)
    ]
    return draw(Chart(title, unit, series))


def table_of(run: RunFiles) -> str:
    """A row for each checkpoint; nothing where none was scored."""
    texts, tasks = _names(run, "heldout"), _names(run, "tasks", "scores")
    rows = [dict(_cells(record, texts, tasks)) for record in run.evaluations]
    return table(*names_and_cells(rows)) if rows else ""


def _cells(record: dict[str, Any], texts: list[str], tasks: list[str]) -> Iterator[tuple[str, str]]:
    yield "step", f"{record['step']:,}"
    yield "tokens", count(record["tokens"])
    for text in texts:
        for key, title in HELDOUT_ROWS.items():
            yield f"{title}, {text}" if len(texts) > 1 else title, number(get(record, "heldout", text, key), 5)
    for task in tasks:
        yield task, _with_error(record, "scores", "stderr", task)
        yield f"{task}, bits per byte", _with_error(record, "bits_per_byte", "bits_per_byte_stderr", task)


def _with_error(record: dict[str, Any], name: str, error: str, task: str) -> str:
    value, spread = (number(get(record, "tasks", key, task), 4) for key in (name, error))
    return value if spread == "-" else f"{value} +- {spread}"


def _names(run: RunFiles, *keys: str) -> list[str]:
    """Of what any of the records has under these keys, in the order of their coming."""
    found: dict[str, None] = {}
    for record in run.evaluations:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        found |= dict.fromkeys(value if isinstance(value, dict) else ())
    return list(found)
