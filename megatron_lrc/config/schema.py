"""Every setting as data, made from the dataclass fields of `settings`; and how a value becomes a setting's type."""

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from .config import Config
from .counts import parse_count


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One field of one section, with what a flag needs to know about it."""

    section: str
    name: str
    kind: Any  # bool, int, float, str, list[str] or a Literal; without its "| None"
    is_optional: bool
    default: Any
    help: str
    metavar: str
    is_required: bool
    takes_suffix: bool  # 10B for ten billion
    is_auto_if_none: bool  # None is written `auto`, and is replaced by a number before the run starts
    per_rank: Literal["path", "value"] | None  # what each rank may have its own (`settings.setting`)

    @property
    def choices(self) -> tuple[str, ...]:
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    @property
    def expectation(self) -> str:
        """What a value has to be, for messages."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.takes_suffix:
            return "a whole number such as 1000000, 500M, 10B or 1.5e9"
        if self.is_auto_if_none:
            return "a number, or auto"
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        return names.get(self.kind, "a list of texts")


def iterate_settings() -> Iterator[Setting]:
    """Every setting, section by section, in the order of config.py."""
    for section in fields(Config):
        hints = typing.get_type_hints(section.default_factory)
        for field in fields(section.default_factory):  # type: ignore[arg-type]
            hint = hints[field.name]
            options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
            yield Setting(
                section=section.name,
                name=field.name,
                kind=options[0],
                is_optional=type(None) in options,
                default=field.default if field.default_factory is MISSING else field.default_factory(),
                help=field.metadata["help"],
                metavar=field.metadata.get("metavar") or {int: "N", float: "X"}.get(options[0], "TEXT"),
                is_required=field.metadata.get("required", False),
                takes_suffix=field.metadata.get("takes_suffix", False),
                is_auto_if_none=field.metadata.get("is_auto_if_none", False),
                per_rank=field.metadata.get("per_rank"),
            )


SETTINGS = {setting.name: setting for setting in iterate_settings()}
SECTIONS = tuple(section.name for section in fields(Config))


def check_kinds(config: Config) -> None:
    """TypeError where a value, as an earlier process stored it, is of another kind than its setting's."""
    for setting in SETTINGS.values():
        value = getattr(getattr(config, setting.section), setting.name)
        if value is None or (setting.kind == list[str] and isinstance(value, list)):
            continue
        kinds = {bool: bool, int: (int, float), float: (int, float)}.get(setting.kind, str)
        if not isinstance(value, kinds):
            raise TypeError(f"{setting.name} is of another kind")


def convert(setting: Setting, value: Any) -> Any:
    """`value`, from YAML or as the text of a flag, as the setting's type; ValueError with the expectation otherwise."""
    if value is None and setting.is_optional:
        return None
    if value == "auto" and setting.is_auto_if_none:
        return None
    if setting.kind == list[str]:
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in items):
            return [str(item) for item in items]
    elif setting.choices:
        if value in setting.choices:
            return value
    elif setting.kind is bool or setting.kind is str:
        if isinstance(value, setting.kind):
            return value
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        number = parse_count(value) if setting.takes_suffix else parse_number(value, setting.kind)
        if number is not None:
            return number
    raise ValueError(f"{value!r} is not {setting.expectation}")


def parse_number(value: str | int | float, kind: type) -> int | float | None:
    """Text is taken for numbers too: PyYAML reads `1e-4` as text. No rounding: 1.5 is no whole number."""
    if kind is int and isinstance(value, float):
        return None
    try:
        return kind(value)
    except ValueError:
        return None


def suggest(word: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
