"""Lines for the terminal: warnings in yellow, errors in red, where there is a terminal that has colours.

Nothing else is coloured. Log files, pipes and what torchrun writes into files stay plain, since they are no terminal;
so does everything with NO_COLOR (no-color.org) or TERM=dumb.
"""

import os
import sys
from contextlib import suppress
from typing import TextIO

WARNING, ERROR = "warning: ", "error: "
_YELLOW, _RED, _PLAIN = "\033[33m", "\033[31m", "\033[0m"


def say(line: str, file: TextIO | None = None) -> None:
    """A line, at once even where stdout is a file. What it begins with says whether it is a warning or an error."""
    colour = _YELLOW if line.startswith(WARNING) else _RED if line.startswith(ERROR) else ""
    _write(line, colour, file or sys.stdout)


def complain(line: str) -> None:
    """An error to stderr, whatever it begins with."""
    _write(line, _RED, sys.stderr)


def _write(line: str, colour: str, file: TextIO) -> None:
    with suppress(OSError):  # a log file on a full disk, or a pipe that nobody reads: no run ends for a line
        print(f"{colour}{line}{_PLAIN}" if colour and _has_colours(file) else line, file=file, flush=True)


def finish() -> None:
    """Before the process ends: what a full disk has not taken is lost, or Python would make an exit code of it."""
    for file in (sys.stdout, sys.stderr):
        try:
            file.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def _has_colours(file: TextIO) -> bool:
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
