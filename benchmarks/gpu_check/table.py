"""What a file of the checks says, as lines to read."""

import itertools
import textwrap
from collections.abc import Iterator
from typing import Any

from benchmarks.measure import table

WIDTH = 110


def lines_of(content: dict[str, Any]) -> Iterator[str]:
    """Each stage with its checks: those that measured the same side by side, then what they list; the others by what
    became of them; and how many there were."""
    for stage in content["stages"]:
        yield from ("", f"{stage['name']}: {stage['status']}, {stage.get('seconds', 0):.0f} s{_why(stage)}")
        for names, group in itertools.groupby(stage["checks"], lambda check: tuple(_single_figures(check))):
            checks = list(group)
            if not names:
                yield from _without_figures(checks)
            elif len(checks) == 1:
                figures = ", ".join(f"{name} {_value(value)}" for name, value in _single_figures(checks[0]).items())
                yield from _wrapped(f"{_title(checks[0])}: {figures}{_why(checks[0])}")
            else:
                rows = [
                    ["", *names],
                    *([_title(check), *map(_value, _single_figures(check).values())] for check in checks),
                ]
                yield from (f"  {line}" for line in table(rows))
                yield from (f"  {check['name']}{_why(check)}" for check in checks if _why(check))
            for check in checks:
                yield from _details(check)
    yield from ("", summary(content))


def summary(content: dict[str, Any]) -> str:
    statuses = [check["status"] for stage in content["stages"] for check in stage["checks"]]
    seconds = sum(stage.get("seconds", 0) for stage in content["stages"])
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    return f"{counts}; {seconds:.0f} s"


def _without_figures(checks: list[dict[str, Any]]) -> Iterator[str]:
    """Those with the same reason together."""
    for why, group in itertools.groupby(checks, lambda check: f"{check['status']}{_why(check)}"):
        yield from _wrapped(f"{why}: {'; '.join(check['name'] for check in group)}")


def _details(check: dict[str, Any]) -> Iterator[str]:
    """What it lists, and the warnings there were."""
    for name, rows in check.get("figures", {}).items():
        if isinstance(rows, list) and rows:
            yield f"  {check['name']}, {name}:"
            yield from (f"    {row}" for row in rows)
    for line in check.get("warnings", []):
        yield from _wrapped(f"warning in {check['name']}: {line}")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _title(check: dict[str, Any]) -> str:
    return f"{check['status']}  {check['name']}"


def _why(entry: dict[str, Any]) -> str:
    why = entry.get("reason") or entry.get("error")
    return f": {why.splitlines()[0]}" if why else ""


def _single_figures(check: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in check.get("figures", {}).items() if not isinstance(value, list)}


def _value(value: Any) -> str:
    if isinstance(value, dict):  # a `Bound`
        return f"{_value(value['value'])} <= {_value(value['limit'])}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
    return str(value)
