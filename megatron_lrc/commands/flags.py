"""What the commands' flags and output have in common."""

import argparse
from typing import Any


def new_parser(program: str, text: str | None, **more: Any) -> argparse.ArgumentParser:
    """text: the command's docstring, which --help shows as it is."""
    return argparse.ArgumentParser(
        prog=program,
        description=text,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **more,
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def say(line: str) -> None:
    """A line of progress, at once even where stdout is a file."""
    print(line, flush=True)
