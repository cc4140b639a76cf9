"""Lines of files whose lines may have no end: a packed file of kilobytes may hold one of gigabytes.

A line that is too long is read past in pieces, and `TOO_LONG` stands in its place, which whoever parses lines refuses
as a bad line of that number.
"""

from collections.abc import Iterator
from typing import IO

#: Bytes of a line, so of a document. As JSON a line of this size may take 1 GB of memory: "[],[],..." does.
LONGEST_LINE = 1 << 25
TOO_LONG = b"a line that is too long\n"  # no JSON, so that no good line is taken for it
_PIECE = 1 << 20


def lines_of(file: IO[bytes], end: int | None = None) -> Iterator[bytes]:
    """The lines from where the file stands, up to byte `end` of it, each with the newline that ends it."""
    while (end is None or file.tell() < end) and (line := file.readline(LONGEST_LINE + 1)):
        if len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            pass_line(file)
            line = TOO_LONG
        yield line


def pass_line(file: IO[bytes]) -> None:
    """Go to the beginning of the next line, in little memory."""
    while (piece := file.readline(_PIECE)) and not piece.endswith(b"\n"):
        pass
