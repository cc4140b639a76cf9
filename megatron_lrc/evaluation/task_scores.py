"""Scores of tasks from what lm-evaluation-harness says of every row: means, standard errors, bits per byte.

Bits per byte are the negative base-2 log-likelihood of the right answer over the UTF-8 bytes of what is predicted: the
harness's continuation, with the space before it, as in " Paris". Where accuracies of small models are chance, they
still tell models apart. With several right answers, the one of fewest bits per byte counts.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lrc.config import ConfigError

#: Output types of the harness whose rows have log-likelihoods of given answers.
_WITH_LIKELIHOODS = ("multiple_choice", "loglikelihood")


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """score: of `metric`, a fraction where that is an accuracy. Means over `rows`, of a group over the rows of all its
    tasks together; each stderr is sd / sqrt(rows), None where the metric is no mean or there is one row. bits_per_byte
    is None where answers are generated."""

    metric: str
    score: float
    stderr: float | None
    rows: int
    bits_per_byte: float | None
    bits_per_byte_stderr: float | None


def score_of(results: dict[str, Any], tasks: dict[str, Any], metric: str | None) -> TaskScore:
    """Of a task or a group. tasks: the harness's Task by name. metric: None for the tasks' own, acc_norm or acc first.

    results: of the harness's `simple_evaluate` with log_samples.
    """
    keys = _keys_of(results, list(tasks), metric)
    rows = {leaf: _rows(results["samples"][leaf], keys[leaf]) for leaf in tasks}
    counts = [len(found) for found in rows.values()]
    name = next(iter(keys.values())).partition(",")[0]
    # The harness's own figures, so that a metric that is no mean over rows is right too.
    values = [results["results"][leaf][keys[leaf]] for leaf in tasks]
    bits = [bits for leaf, task in tasks.items() for bits in _bits_per_byte(task, rows[leaf])]
    return TaskScore(
        metric=name,
        score=sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts),
        stderr=_stderr_of_means(tasks, rows, name),
        rows=sum(counts),
        bits_per_byte=statistics.fmean(bits) if bits else None,
        bits_per_byte_stderr=standard_error(bits),
    )


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, from the sample's standard deviation; None of fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _keys_of(results: dict[str, Any], leaves: list[str], metric: str | None) -> dict[str, str]:
    """Task -> METRIC,FILTER as the harness names its figure: one metric for all of them."""
    known = {leaf: results["results"][leaf] for leaf in leaves}
    figures = {leaf: [key for key in found if "," in key and "_stderr," not in key] for leaf, found in known.items()}
    names = {leaf: [key.partition(",")[0] for key in keys] for leaf, keys in figures.items()}
    wanted = [metric] if metric else ["acc_norm", "acc", *names[leaves[0]]]
    chosen = next((name for name in wanted if all(name in known for known in names.values())), None)
    if chosen is None:
        raise ConfigError(f"The tasks {', '.join(leaves)} have no metric in common. Name them one by one in --tasks.")
    return {leaf: figures[leaf][names[leaf].index(chosen)] for leaf in leaves}


def _rows(samples: Iterable[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """What the harness says of each row; it repeats a row for each of its filters."""
    wanted = key.partition(",")[2]
    return [sample for sample in samples if sample["filter"] == wanted]


def _stderr_of_means(tasks: dict[str, Any], rows: dict[str, list[dict[str, Any]]], metric: str) -> float | None:
    is_mean = all(getattr(task.aggregation().get(metric), "__name__", "") == "mean" for task in tasks.values())
    values = [row[metric] for found in rows.values() for row in found]
    return standard_error([float(value) for value in values]) if is_mean else None


def _bits_per_byte(task: Any, rows: list[dict[str, Any]]) -> Iterable[float]:
    if task.OUTPUT_TYPE not in _WITH_LIKELIHOODS:
        return
    for row in rows:
        texts = [arguments[1] for arguments in row["arguments"]]
        likelihoods = [float(found[0]) for found in row["filtered_resps"]]
        right = _right_answers(task, row["doc"])
        if right:
            yield min(-likelihoods[place] / math.log(2) / len(texts[place].encode()) for place in right)


def _right_answers(task: Any, row: dict[str, Any]) -> list[int]:
    """Places of the right ones among a row's requests; none where the row has none."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return [0]
    gold = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
    choices = task.doc_to_choice(row)
    places = [choices.index(one) if one in choices else one for one in (gold if isinstance(gold, list) else [gold])]
    return [place for place in places if isinstance(place, int) and 0 <= place < len(choices)]
