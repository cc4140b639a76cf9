"""How good a finished run's student is, measured by `evaluate` and kept beside the run, in RUN/evaluation.json.

Measured part by part: every held-out text, every task, the projections. A part is on record with what was asked, so
that it is not measured twice, whatever interrupts the comparison and whatever else is asked for later.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_lrc.json_files import read_json, read_object
from megatron_lrc.whole_files import write_whole

EVALUATION = "evaluation.json"
Kind = Literal["clone", "student", "teacher"]  # a clone has projections, another student has not
PROJECTIONS = "projections"


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a student is scored on. corpora: name -> prefix of an indexed dataset, taken whole. tasks: of the harness,
    their rows in tasks_dir unless that is None. max_tokens: of each corpus; 0: all. flags: the user's
    for `evaluate`.
    """

    teacher: Path
    corpora: tuple[tuple[str, str], ...] = ()
    tasks: tuple[str, ...] = ()
    tasks_dir: Path | None = None
    seq_length: int = 128
    max_tokens: int = 0
    flags: tuple[str, ...] = ()

    def parts(self, kind: Kind) -> dict[str, list[str]]:
        """Name -> flags of the program that measures it, in the order in which they are measured. The teacher's loss on
        text is measured beside every student's."""
        parts: dict[str, list[str]] = {PROJECTIONS: []} if kind == "clone" else {}
        for name, prefix in self.corpora if kind != "teacher" else ():
            parts[_text(name)] = [
                *("--data-path", prefix, "--eval-split", "all", "--max-tokens", str(self.max_tokens)),
                *("--seq-length", str(self.seq_length), *self.flags, "--teacher", str(self.teacher)),
            ]
        folder = () if self.tasks_dir is None else ("--tasks-dir", str(self.tasks_dir))
        return parts | {f"task {task}": ["--tasks", task, *folder, *self.flags] for task in self.tasks}

    def missing(self, record: Path, kind: Kind) -> dict[str, list[str]]:
        """The parts that are not on record."""
        done = read_evaluation(record)
        return {name: asked for name, asked in self.parts(kind).items() if done.get(name, {}).get("asked") != asked}


def read_evaluation(record: Path) -> dict[str, Any]:
    """Part -> what was asked and found; empty where nothing has been measured."""
    try:
        return read_object(record)
    except (OSError, ValueError):
        return {}


def score(model: Path, record: Path, kind: Kind, scoring: Scoring, call: Callable[[Sequence[str]], int]) -> str:
    """Measure what is missing, and write each part as it comes. call: runs a command, gives its exit code.

    model: a run directory, or the teacher's. Gives the part at which it failed; empty if all is on record.
    """
    for name, asked in scoring.missing(record, kind).items():
        partial = record.with_name(f"{record.name}.partial")
        program = ["megatron_lrc.evaluation.projections"] if name == PROJECTIONS else ["megatron_lrc", "evaluate"]
        if call([sys.executable, "-m", *program, str(model), *asked, "--output", str(partial)]) != 0:
            return name
        found = {**read_evaluation(record), name: {"asked": asked, **read_json(partial)}}
        write_whole(record, json.dumps(found, indent=1) + "\n")
        partial.unlink()
    return ""


# ------------------------------------------------------------------------------------------------------------ figures


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """accuracy in percent (or the task's own metric, where that is a perplexity); bits_per_byte of the right answer;
    and their standard errors over the rows. None where they were not measured."""

    accuracy: float
    accuracy_error: float | None = None
    bits_per_byte: float | None = None
    bits_error: float | None = None


def text_figures(evaluation: dict[str, Any], scoring: Scoring) -> dict[str, dict[str, float]]:
    """Corpus -> figures of `evaluate`: lm_loss, kl, top1_agreement, teacher_lm_loss, ..."""
    parts = {name: evaluation.get(_text(name), {}).get("heldout", {}) for name, _ in scoring.corpora}
    found = {name: parts[name].get("figures", {}).get(prefix) for name, prefix in scoring.corpora}
    return {name: figures for name, figures in found.items() if figures is not None}


def _text(corpus: str) -> str:
    """Name of the part."""
    return f"text {corpus}"


def task_figures(evaluation: dict[str, Any]) -> dict[str, TaskFigures]:
    """By task, in the order in which they were measured."""
    return dict(_tasks(evaluation))


def _tasks(evaluation: dict[str, Any]) -> Iterator[tuple[str, TaskFigures]]:
    for part in evaluation.values():
        tasks = part.get("tasks", {})
        for task, score in tasks.get("scores", {}).items():
            error, bits, bits_error = (
                tasks.get(key, {}).get(task) for key in ("stderr", "bits_per_byte", "bits_per_byte_stderr")
            )
            unit = 1 if "perplexity" in tasks.get("metrics", {}).get(task, "") else 100
            yield task, TaskFigures(unit * score, None if error is None else unit * error, bits, bits_error)


def average(figures: Sequence[float | None]) -> float | None:
    """None without figures."""
    found = [figure for figure in figures if figure is not None]
    return statistics.fmean(found) if found else None
