"""Fewer points than records, by rules that the page states.

Curves: at most MAX_BUCKETS buckets of equally many consecutive points, of each the lowest and the highest, in their
order: no spike is lost. Heat maps: at most MAX_COLUMNS columns of consecutive records, the mean of each.
"""

import math
from collections.abc import Sequence

MAX_BUCKETS, MAX_COLUMNS = 250, 160

Point = tuple[float, float]

RULE = (
    f"Curves of more than {2 * MAX_BUCKETS} records show the lowest and the highest of each of {MAX_BUCKETS} equal "
    f"groups of consecutive records, so no spike is lost; heat maps show means of at most {MAX_COLUMNS} such groups."
)


def thin(points: Sequence[Point]) -> list[Point]:
    """At most 2 * MAX_BUCKETS of the points, the first and the last among them."""
    return [points[index] for index in kept_indices([y for _, y in points])]


def kept_indices(values: Sequence[float]) -> list[int]:
    """Which values `thin` keeps, ascending."""
    if len(values) <= 2 * MAX_BUCKETS:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    for bounds in _buckets(len(values), MAX_BUCKETS):
        kept.add(min(bounds, key=values.__getitem__))
        kept.add(max(bounds, key=values.__getitem__))
    return sorted(kept)


def average_rows(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """At most MAX_COLUMNS rows, each the element-wise mean of consecutive ones; NaN where all are."""
    averages = []
    for bounds in _buckets(len(rows), min(MAX_COLUMNS, len(rows))):
        bucket = [rows[index] for index in bounds]
        width = max(map(len, bucket))
        averages.append([_mean([row[place] for row in bucket if place < len(row)]) for place in range(width)])
    return averages


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _buckets(length: int, count: int) -> list[range]:
    bounds = [length * place // count for place in range(count + 1)] if count else []
    return [range(low, high) for low, high in zip(bounds, bounds[1:], strict=False)]
