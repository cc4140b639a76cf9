"""How good the students are, as rows of text: on held-out text, on tasks, and their projections."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from megatron_lrc.comparison.results import Group, Result, spread
from megatron_lrc.comparison.scoring import PROJECTIONS, Scoring, TaskFigures, average, task_figures, text_figures
from megatron_lrc.report.run_tables import names_and_cells
from megatron_lrc.train.progress import count

Rows = tuple[list[str], list[list[str]]]  # names of the columns, cells
Row = dict[str, str]


def score_sections(
    groups: Sequence[Group], starts: Sequence[Group], scoring: Scoring, teacher: dict[str, Any]
) -> list[tuple[str, Rows]]:
    """Title and table, maybe without rows. teacher: its own scores."""
    students = [*((one, count(one.tokens)) for one in groups), *((one, "0") for one in starts)]
    return [
        ("Held-out text", _table(students, lambda one: _text_row(one, scoring), _teacher_text(groups, scoring))),
        ("Tasks", _table(students, _accuracy_row, _accuracies([task_figures(teacher)]))),
        ("Bits per byte of the right answers", _table(students, _bits_row, _bits([task_figures(teacher)]))),
        ("Projections at the end", _table(students, _projection_row, {})),
    ]


def _table(students: Sequence[tuple[Group, str]], row_of: Callable[[Group], Row], teacher: Row) -> Rows:
    """A row for each student that has figures, then the teacher's. Columns: those of any row."""
    rows = []
    for one, tokens in students:
        if figures := row_of(one):
            name = one.name if tokens != "0" else f"before training: {one.about.removeprefix('start of ')}"
            rows.append({"contestant": name, "tokens": tokens, "seeds": str(len(one.results)), **figures})
    if rows and teacher:
        rows.append({"contestant": "(teacher)", **teacher})
    columns = dict.fromkeys(name for row in rows for name in row)
    return names_and_cells([{name: row.get(name, "") for name in columns} for row in rows])


# ------------------------------------------------------------------------------------------------------ held-out text


def _text_row(one: Group, scoring: Scoring) -> Row:
    """Of each corpus; without any, KL and top-1 of the run's last validation."""
    found = [text_figures(result.evaluation, scoring) for result in one.results]
    row: Row = {}
    for name, _ in scoring.corpora:
        figures = [each[name] for each in found if name in each]
        if figures:
            row |= _agreement(name, figures, "kl")
    if row:
        return row
    last = [result.last for result in one.results]
    return _agreement("validation", last, "teacher_kl") if all("teacher_kl" in record for record in last) else {}


def _agreement(corpus: str, figures: Sequence[dict[str, Any]], kl: str) -> Row:
    columns = {"LM loss": ("lm_loss", _loss), "KL": (kl, _loss), "top-1": ("top1_agreement", _percent)}
    row = {}
    for column, (key, show) in columns.items():
        values = [record[key] for record in figures if record.get(key) is not None]
        if values:
            row[f"{corpus}: {column}"] = spread(values, show)
    return row


def _teacher_text(groups: Sequence[Group], scoring: Scoring) -> Row:
    """Its loss is measured with every student."""
    for one in groups:
        for result in one.results:
            if figures := text_figures(result.evaluation, scoring):
                return {f"{name}: LM loss": _loss(each["teacher_lm_loss"]) for name, each in figures.items()}
    return {}


# -------------------------------------------------------------------------------------------------------------- tasks


def _tasks_of(one: Group) -> list[dict[str, TaskFigures]]:
    return [found for result in one.results if (found := task_figures(result.evaluation))]


def _accuracy_row(one: Group) -> Row:
    return _accuracies(_tasks_of(one))


def _bits_row(one: Group) -> Row:
    return _bits(_tasks_of(one))


def _accuracies(seeds: Sequence[dict[str, TaskFigures]]) -> Row:
    """In percent. The average is over the tasks that every seed has."""
    row = {}
    for task in _common(seeds):
        figures = [found[task] for found in seeds]
        row[task] = _with_error([each.accuracy for each in figures], [each.accuracy_error for each in figures], _tenth)
    if len(row) > 1:
        row["average"] = spread([_mean_accuracy(found, list(row)) for found in seeds], _tenth)
    return row


def _bits(seeds: Sequence[dict[str, TaskFigures]]) -> Row:
    row = {}
    for task in _common(seeds):
        figures = [found[task] for found in seeds]
        values = [each.bits_per_byte for each in figures if each.bits_per_byte is not None]
        if values:
            row[task] = _with_error(values, [each.bits_error for each in figures], _loss)
    if len(row) > 1:
        by_seed = [average([found[task].bits_per_byte for task in row]) for found in seeds]
        row["average"] = spread([value for value in by_seed if value is not None], _loss)
    return row


def _with_error(values: Sequence[float], errors: Sequence[float | None], show: Callable[[float], str]) -> str:
    """With the standard error of one seed's figure: all seeds answer the same questions, so that it does not shrink
    with their number."""
    error = average(errors)
    return spread(values, show) + ("" if error is None else f" ± {show(error)}")


def _common(seeds: Sequence[dict[str, TaskFigures]]) -> list[str]:
    """Tasks that all seeds have."""
    return [task for task in (seeds[0] if seeds else ()) if all(task in found for found in seeds)]


def _mean_accuracy(found: dict[str, TaskFigures], tasks: Sequence[str]) -> float:
    return sum(found[task].accuracy for task in tasks) / len(tasks)


# -------------------------------------------------------------------------------------------------------- projections


def _projection_row(one: Group) -> Row:
    found = [measured for result in one.results if (measured := _projections(result)).get("matrices")]
    if not found:
        return {}
    conditions = [measured["condition"] for measured in found]
    return {
        "projections": str(found[0]["matrices"]),
        "mean effective rank": spread([measured["effective_rank"] for measured in found], _tenth),
        "median condition number": "infinite" if None in conditions else spread(conditions, lambda x: f"{x:.3g}"),
    }


def _projections(result: Result) -> dict[str, Any]:
    return result.evaluation.get(PROJECTIONS, {})


# ------------------------------------------------------------------------------------------------------------- values


def as_values(evaluation: dict[str, Any], scoring: Scoring) -> dict[str, Any]:
    """For results.json."""
    return {
        "text": text_figures(evaluation, scoring),
        "tasks": {task: asdict(figures) for task, figures in task_figures(evaluation).items()},
        "projections": {key: value for key, value in evaluation.get(PROJECTIONS, {}).items() if key != "asked"},
    }


def _loss(value: float) -> str:
    return f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _tenth(value: float) -> str:
    return f"{value:.1f}"
