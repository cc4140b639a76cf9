"""Conditions on a row's other columns: --filter 'int_score >= 4'. Text is parsed, never evaluated.

    COLUMN OP VALUE       OP is one of >= > <= < == !=
    COLUMN in [VALUE, VALUE, ...]

A value is a number, true or false, or a string, which needs quotes where it looks like one of the others or holds a
comma, a bracket or a quote. Numbers compare with numbers, strings with strings (by code points, so that dates as
YYYY-MM-DD have their order) and true and false with themselves, for == and != only; anything else is an error, since a
condition that is never met would leave out a whole corpus without a word. Null meets no condition, as in SQL.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lrc.config import ConfigError
from megatron_lrc.data.json_kinds import kind_named

Scalar = str | int | float | bool

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_QUOTED = r'"[^"]*"|\'[^\']*\''
_CONDITION = re.compile(rf"\s*({_QUOTED}|[^\s<>=!\"']+)\s*(>=|<=|==|!=|>|<|\bin\b)\s*(.+?)\s*", re.DOTALL)
_ITEM = re.compile(rf"\s*({_QUOTED}|[^,\[\]\"']*[^,\[\]\"'\s])\s*(,|$)")
_BARE = re.compile(r"[^,\[\]\"'<>=!]+")
_EXAMPLES = "'int_score >= 4' or 'language in [en, de]'"


@dataclass(frozen=True, kw_only=True)
class Filter:
    """One condition. values: what the column is compared with; several for `in` only, and all of one kind."""

    text: str  # as it was written
    column: str
    operator: str
    values: tuple[Scalar, ...]

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether a row meets it. The message of the ConfigError completes "FILE:LINE: "."""
        if self.column not in record:
            raise ConfigError(f"no key {self.column!r}, which --filter '{self.text}' asks for")
        value = record[self.column]
        if value is None:
            return False
        if kind_of_scalar(value) != self.kind:
            raise ConfigError(
                f"the value of {self.column!r} is {kind_named(value)}, which --filter '{self.text}' cannot "
                f"compare with {kind_named(self.values[0])}"
            )
        if self.operator == "in":
            return value in self.values
        return _OPERATORS[self.operator](value, self.values[0])

    @property
    def kind(self) -> str:
        """What the column has to hold: "number", "string" or "bool"."""
        return kind_of_scalar(self.values[0])


def kind_of_scalar(value: Any) -> str:
    """ "number", "string", "bool" (which Python takes for a number), or "" for anything else."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "string" if isinstance(value, str) else ""


def parse_filter(text: str) -> Filter:
    """ConfigError for what is no condition, or one that can never be compared."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ConfigError(f"--filter '{text}' is no condition. Give COLUMN OP VALUE, such as {_EXAMPLES}.")
    column, operator_, value = match.groups()
    values = _parse_list(text, value) if operator_ == "in" else (_parse_scalar(text, value),)
    kinds = {kind_of_scalar(value) for value in values}
    if len(kinds) > 1:
        named = " and ".join(sorted(set(map(kind_named, values))))
        raise ConfigError(f"--filter '{text}' mixes {named}. Quote what is meant as a string.")
    if kinds == {"bool"} and operator_ not in ("==", "!=", "in"):
        raise ConfigError(f"--filter '{text}': true and false have no order. Use == or !=.")
    return Filter(text=text.strip(), column=_without_quotes(column), operator=operator_, values=values)


def _parse_list(text: str, value: str) -> tuple[Scalar, ...]:
    """[a, b], with any bracket left out or written as a parenthesis."""
    inner = value[1:-1] if (value[0], value[-1]) in (("[", "]"), ("(", ")")) else value
    values, place = [], 0
    while place < len(inner) and (match := _ITEM.match(inner, place)):
        values.append(_parse_scalar(text, match[1]))
        place = match.end()
    if not values or place < len(inner):
        raise ConfigError(f"--filter '{text}': {value} is no list of values. Give one such as [en, de].")
    return tuple(values)


def _parse_scalar(text: str, value: str) -> Scalar:
    if re.fullmatch(_QUOTED, value):
        return _without_quotes(value)
    if not _BARE.fullmatch(value):
        raise ConfigError(f"--filter '{text}': {value} is no value. Give a number, true, false, or a string in quotes.")
    if value in ("true", "false"):
        return value == "true"
    if value in ("null", "None"):
        raise ConfigError(f"--filter '{text}': null meets no condition. Quote it if it is meant as a word.")
    return _parse_number(value)


def _parse_number(value: str) -> Scalar:
    """The string itself, if it is none. Neither nan nor inf: as bare words they are strings."""
    for kind in (int, float):
        try:
            number = kind(value)
        except ValueError:
            continue
        if math.isfinite(number) and "_" not in value:
            return number
    return value


def _without_quotes(word: str) -> str:
    return word[1:-1] if re.fullmatch(_QUOTED, word) else word
