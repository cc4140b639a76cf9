"""What the commands' flags and output have in common."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
METAVARS = {int: "N", float: "X"}


def new_parser(program: str, text: str | None, **more: Any) -> argparse.ArgumentParser:
    """text: the command's docstring, which --help shows as it is."""
    shown = {"description": text, "formatter_class": argparse.RawDescriptionHelpFormatter}
    return argparse.ArgumentParser(program, allow_abbrev=False, **shown, **more)


def flag_adder(group: Any, metavars: Mapping[Any, str] = METAVARS) -> Callable[..., None]:
    """Gives add(NAME, TEXT, ...), which adds a flag to a parser or a group of it.

    After the text --help tells the default, if one is given. metavars: of flags that name none, by type.
    """

    def add(name: str, text: str, **how: Any) -> None:
        default = how.get("default")
        if how.get("type") in metavars:
            how.setdefault("metavar", metavars[how["type"]])
        if default is not None and "(default:" not in text:
            words = " ".join(map(str, default)) if isinstance(default, list) else default
            text += f" (default: {'none' if words == '' else words})"
        group.add_argument(name, help=text, **how)

    return add


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
