"""The page's charts: which fields of the records are drawn, with what beside them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from megatron_lrc.config import CLONE_TERMS, TINYBERT_TERMS
from megatron_lrc.report.charts import Chart, Series, draw, draw_heat_map
from megatron_lrc.report.run_files import RunFiles
from megatron_lrc.report.thinning import Point

TRAIN, VALID, TEACHER, TEACHER_VALID = 0, 1, 2, 3  # colours of the same thing in every chart
PARTS = ("teacher_forward", "student_forward", "student_backward", "projections")


def get(record: dict[str, Any], *keys: str) -> float:
    """A number in a record, or in a part of it; NaN if it is missing or null."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) else math.nan


def points(records: Sequence[dict[str, Any]], *keys: str, scale: float = 1.0) -> list[Point]:
    return [(record["tokens"], scale * get(record, *keys)) for record in records]


class Curves:
    """Makes charts of one run; each method gives a section's figures, those without a value left out."""

    def __init__(self, run: RunFiles):
        self._run, self._records = run, run.records
        self._validations = [record for record in run.validations if isinstance(record.get("tokens"), int)]
        self._marks = [run.tokens_at(start["step"]) for start in run.starts[1:]]

    def losses(self) -> list[str]:
        kl_unit = "nats per token, times tau squared"
        return [
            self._loss("LM loss", "nats per token", "lm_loss", with_teacher=True),
            self._loss("Loss", "what is minimised: weighted sum of the three", "loss"),
            self._loss("KL loss", kl_unit, "kl_loss"),
            self._loss("Clone loss", "squared error, summed over layers and terms", "clone_loss", is_log=True),
        ]

    def heat_maps(self) -> list[str]:
        ends, by_layer = [record["tokens"] for record in self._records], self._run.clone_by_layer
        names = [term for term in (*CLONE_TERMS, *TINYBERT_TERMS) if term in by_layer]
        return [draw_heat_map(term, by_layer[term], (ends[0], ends[-1])) for term in names if ends]

    def optimization(self) -> list[str]:
        name, records = "grad_norm_by_group", self._records
        groups = list(records[-1].get(name) or {}) if records else []
        by_group = [Series(group, points(records, name, group), color) for color, group in enumerate(groups)]
        return [
            self._one("Learning rate", "", "lr", from_zero=True),
            self._one("Gradient norm", "before clipping", "grad_norm", is_log=True),
            self._draw("Gradient norm by group", "projections of each kind; norm gains", by_group, is_log=True),
            self._some("Loss scale", "fp16", "loss_scale", _varies, is_log=True),
            self._some("Skipped steps", "between two records", "skipped_steps", any, from_zero=True),
        ]

    def machine(self) -> list[str]:
        field, title, unit, scale = ("tflops", "TFLOP/s by part", "per device", 1.0)
        if any(get(record, "mfu", "total") > 0 for record in self._records):
            field, title, unit, scale = ("mfu", "MFU by part", "% of the device's peak", 100.0)
        known = [record for record in self._records if get(record, field, "total") > 0]
        parts = [
            Series(part.replace("_", " "), points(known, field, part, scale=scale), color)
            for color, part in enumerate(PARTS)
        ]
        memory = [
            Series("peak", points(self._records, "memory_gib", "peak"), 0),
            Series("now", points(self._records, "memory_gib", "now"), 1),
        ]
        slowest = [record for record in self._records if "straggler" in record]
        stragglers = [
            Series("slowest rank", [(r["tokens"], _own_seconds(r)) for r in slowest], 3),
            Series("its peers' median", points(slowest, "straggler", "peers_seconds"), 0),
        ]
        return [
            self._one("Throughput", "tokens per second, all devices", "tokens_per_second", from_zero=True),
            self._draw(title, unit, parts, is_stacked=True),
            self._draw("Memory", "GiB, the rank with the most", memory, from_zero=True),
            self._one("Step time", "seconds per step", "step_seconds", from_zero=True),
            self._draw("Slowest rank", "seconds of own work per step", stragglers, from_zero=True),
        ]

    def effective_rank(self) -> list[str]:
        measured = [record for record in self._validations if isinstance(record.get("effective_rank"), dict)]
        if not measured:
            return []
        series = []
        for color, model in enumerate(("teacher", "student")):
            for record, style in ((measured[-1], "line"), (measured[0], "dashed")):
                ranks = record["effective_rank"].get(model)
                is_wanted = style == "line" or (record is not measured[-1] and model == "student")
                if isinstance(ranks, list) and ranks and is_wanted:
                    name = model if style == "line" else f"{model} at step {record['step']}"
                    series.append(Series(name, list(enumerate(ranks)), color, style))
        title = f"Effective rank at step {measured[-1]['step']}"
        unit = "of the hidden states at each layer's input"
        return [draw(Chart(title, unit, series, from_zero=True, x_name="layer"))]

    def _loss(self, title: str, unit: str, key: str, *, with_teacher: bool = False, is_log: bool = False) -> str:
        series = [
            Series("train", points(self._records, key), TRAIN),
            Series("validation", points(self._validations, key), VALID, "dots"),
        ]
        if with_teacher:
            name = "teacher_lm_loss"
            series.append(Series("teacher, train", points(self._records, name), TEACHER))
            series.append(Series("teacher, validation", points(self._validations, name), TEACHER_VALID, "dashed"))
        return self._draw(title, unit, series, is_log=is_log)

    def _one(self, title: str, unit: str, key: str, **how: bool) -> str:
        return self._draw(title, unit, [Series("train", points(self._records, key), TRAIN)], **how)

    def _some(self, title: str, unit: str, key: str, is_telling: Callable[[list[float]], bool], **how: bool) -> str:
        return self._one(title, unit, key, **how) if is_telling([y for _, y in points(self._records, key)]) else ""

    def _draw(self, title: str, unit: str, series: list[Series], **how: bool) -> str:
        return draw(Chart(title, unit, series, marks=self._marks, **how))  # type: ignore[arg-type]


def _own_seconds(record: dict[str, Any]) -> float:
    return get(record, "straggler", "data_seconds") + get(record, "straggler", "compute_seconds")


def _varies(values: list[float]) -> bool:
    return len({value for value in values if math.isfinite(value)}) > 1
