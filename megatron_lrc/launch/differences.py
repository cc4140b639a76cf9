"""What ranks that differ differ in, in words: which ranks, on which hosts, have which value of what."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: In one message: fields, values of a field, runs of rank numbers; characters of a value.
FIELDS, VALUES, RUNS, LONGEST_VALUE = 6, 3, 6, 80

#: Rank -> what it has said of itself, `host` among it.
Lines = Mapping[int, Mapping[str, Any]]


def describe_differences(
    kinds: Iterable[tuple[Sequence[int], Mapping[str, str]]], silent: Sequence[int], lines: Lines
) -> str:
    """kinds: ranks that are alike, and their fields. silent: ranks that differ, but have not said in what."""
    kinds = list(kinds)
    differences = []
    for name in dict.fromkeys(name for _, fields in kinds for name in fields):
        values: dict[str, list[int]] = {}
        for ranks, fields in kinds:
            values.setdefault(fields.get(name, "not there"), []).extend(ranks)
        if len(values) > 1:
            differences.append(f"{name} is {describe_values(values, lines)}")
    told = differences[:FIELDS]
    if len(differences) > FIELDS:
        told.append(f"and {len(differences) - FIELDS} more differences")
    if silent:
        told.append(f"{name_ranks(silent)} differ{'s' * (len(silent) == 1)} too")
    return (
        f"The ranks were not started alike: {'; '.join(told)}. Give every rank the same flags, environment, packages, "
        "teacher, data and checkpoints; only paths and hosts may differ."
    )


def describe_values(values: Mapping[str, Sequence[int]], lines: Lines) -> str:
    """`2e-4 on rank 3 (host-b) but 1e-4 on ranks 0-2 (host-a)`: the rarest first, the most frequent last."""
    rarest = sorted(values, key=lambda value: len(values[value]))
    shown = rarest if len(rarest) <= VALUES else [*rarest[: VALUES - 1], rarest[-1]]
    more = len(rarest) - len(shown)
    text = " but ".join(f"{_shortened(value)} on {locate(values[value], lines)}" for value in shown)
    return text + (f" and {more} more values on other ranks" if more else "")


def describe_failures(failed: Lines) -> str:
    """Ranks that could not even say what they are: `failed` says why."""
    texts = list(by_value(failed, "failed").items())
    said = [f"{locate(ranks, failed)} cannot start: {text}" for text, ranks in texts[:VALUES]]
    return " ".join(said)


def locate(ranks: Sequence[int], lines: Lines) -> str:
    """Ranks with their host, or the first of their hosts."""
    hosts = list(dict.fromkeys(str(lines[rank]["host"]) for rank in sorted(ranks)))
    more = f" and {len(hosts) - 1} more" if len(hosts) > 1 else ""
    return f"{name_ranks(ranks)} ({hosts[0]}{more})"


def name_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0-7, 9`; of many scattered ones the first few."""
    numbers = sorted(ranks)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    named = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:RUNS]]
    more = sum(len(run) for run in runs[RUNS:])
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(named)}" + (f" and {more} more" if more else "")


def by_value(lines: Lines, what: str) -> dict[str, list[int]]:
    """Value of `what` -> the ranks that have it, in order."""
    found: dict[str, list[int]] = {}
    for rank in sorted(lines):
        found.setdefault(lines[rank][what], []).append(rank)
    return found


def _shortened(value: str) -> str:
    return value if len(value) <= LONGEST_VALUE else value[:LONGEST_VALUE] + "..."
