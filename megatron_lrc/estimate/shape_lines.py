"""What `megatron-lrc plan shape` says of the shapes that it has found: the table, a CSV file, a picture."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from megatron_lrc.config import short_count
from megatron_lrc.estimate.devices import GIB
from megatron_lrc.estimate.shapes import AXES
from megatron_lrc.png_charts import png_chart
from megatron_lrc.whole_files import write_whole

#: A row's number -> its heading, and how it is written. Those of scores are there only with --score.
COLUMNS = {
    **{axis.field: (axis.heading, str) for axis in AXES},
    "parameters": ("parameters", short_count),
    "kv_cache_bytes": ("KV bytes/token", "{:,}".format),
    "flops": ("GFLOP/token", lambda flops: f"{flops / 1e9:.3g}"),
    "decode_bytes": ("GB read/token", lambda size: f"{size / 1e9:.3f}"),
    "memory_bytes": ("GiB", lambda size: f"{size / GIB:.2f}"),
    "lm_loss": ("LM loss", "{:.3f}".format),
    "teacher_kl": ("KL", "{:.3f}".format),
    "top1_agreement": ("top-1", "{:.1%}".format),
}


def table(teacher: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The teacher's line first. Columns are as wide as what is in them."""
    shown = [name for name in COLUMNS if name in rows[0]]
    named = {**teacher, "lm_loss": rows[0].get("teacher_lm_loss")}
    lines = [["", *(COLUMNS[name][0] for name in shown)]]
    for label, row in (("teacher", named), *(("student", row) for row in rows)):
        lines.append([label, *(COLUMNS[name][1](row[name]) if row.get(name) is not None else "-" for name in shown)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Every number in full, under the names that JSON has too."""
    text = StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue())


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A point for each shape, numbered as the table's rows: the untrained LM loss, or without scores the FLOPs, over
    the bytes read per token."""
    vertical = "lm_loss" if "lm_loss" in rows[0] else "flops"
    label = {"lm_loss": "held-out LM loss before training", "flops": "GFLOP per decoded token"}[vertical]
    scale = {"lm_loss": 1.0, "flops": 1e9}[vertical]
    path.parent.mkdir(parents=True, exist_ok=True)
    with png_chart(path, inches=(8, 5)) as axes:
        across, up = ([row[name] / by for row in rows] for name, by in (("decode_bytes", 1e9), (vertical, scale)))
        for number, (row, *place) in enumerate(zip(rows, across, up, strict=True), 1):
            sizes = " x ".join(str(row[axis.field]) for axis in AXES)
            axes.plot(*place, "o", color="tab:blue", label=f"{number}: {sizes}")
            axes.annotate(str(number), place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.legend(
            handlelength=0, markerscale=0, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False
        )
        axes.set_xlabel("GB read per decoded token")
        axes.set_ylabel(label)
        axes.set_title(" x ".join(axis.heading for axis in AXES))
