"""Finds tensors of a safetensors file that hold one value only: an interrupted download, or a model never trained.

`constant_pieces` looks at a file chunk by chunk, whoever reads it (`content_hash.py`); `find_suspicious` puts
together what was found. Norm gains that are all one and biases that are all zero are as they should be.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy

from megatron_lrc.json_files import parse_json

_FEW = 1024  # elements, of which a tensor that is not zero has one that is not


class Piece(NamedTuple):
    """The part of a tensor that lies in one chunk, if it is constant. value: of one element, its bytes in hex."""

    value: str
    length: int  # in bytes

    @property
    def is_zero(self) -> bool:
        return not any(bytes.fromhex(self.value))


class Span(NamedTuple):
    """Where a tensor lies: bytes of its file, and how many of them make an element."""

    name: str
    shape: tuple[int, ...]
    start: int
    end: int
    itemsize: int


def constant_pieces(path: Path, data: memoryview, start: int) -> dict[str, Piece]:
    """What is constant in these bytes of a file, which begin at `start` of it, by tensor. Other files: nothing."""
    found = {}
    for span in spans_of(path):
        first, last = max(span.start, start), min(span.end, start + len(data))
        if first < last and (first - span.start) % span.itemsize == 0:
            piece = data[first - start : last - start]
            if (value := _only_value(piece, span.itemsize)) is not None:
                found[span.name] = Piece(value, len(piece))
    return found


def _only_value(piece: memoryview, itemsize: int) -> str | None:
    """`Piece.value` if all elements have the same one. Both looks end early where they differ, so they cost little."""
    if _is_zero(piece, itemsize):
        return bytes(itemsize).hex()
    is_constant = len(piece) >= itemsize and piece[itemsize:] == piece[:-itemsize]  # with itself, one element later
    return piece[:itemsize].hex() if is_constant else None


def _is_zero(piece: memoryview, itemsize: int) -> bool:
    """Whether all elements are 0.0 or -0.0: the first bit of a number is its sign."""
    if len(piece) % itemsize:
        return False
    numbers = numpy.frombuffer(piece, f"<u{itemsize}")
    return not (numbers[:_FEW] << 1).any() and not (numbers << 1).any()


def find_suspicious(path: Path, chunks: Sequence[tuple[int, Mapping[str, Piece]]]) -> Iterator[str]:
    """ "NAME in FILE is ..." for each tensor that a trained model would not have. chunks: (bytes, constant pieces)."""
    in_holes = {name for size, pieces in chunks if _is_hole(size, pieces) for name in pieces}
    for span in spans_of(path):
        pieces = [pieces[span.name] for _, pieces in chunks if span.name in pieces]
        values = {piece.value for piece in pieces}
        is_constant = len(values) == 1 and sum(piece.length for piece in pieces) == span.end - span.start
        is_zero = is_constant and pieces[0].is_zero
        is_bias = len(span.shape) == 1 and span.name.endswith("bias")
        if is_constant and not is_bias and (is_zero or (len(span.shape) > 1 and math.prod(span.shape) > 1)):
            yield f"{span.name} in {path.name} is {'all zero' if is_zero else 'constant'}"
        elif span.name in in_holes and not is_constant:
            yield f"{span.name} in {path.name} is partly zero"


def _is_hole(size: int, pieces: Mapping[str, Piece]) -> bool:
    """Whether a whole chunk is zero, as what a download has not brought yet is."""
    return bool(pieces) and sum(piece.length for piece in pieces.values() if piece.is_zero) == size


@lru_cache(maxsize=256)
def _parsed(path: Path, size: int, modified: int) -> tuple[Span, ...]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length))
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        if elements := math.prod(entry["shape"]):
            place = (8 + length + first, 8 + length + last)
            spans.append(Span(name, tuple(entry["shape"]), *place, itemsize=(last - first) // elements))
    return tuple(spans)


def spans_of(path: Path) -> tuple[Span, ...]:
    """The tensors of a safetensors file that have elements, by its header, which opening has checked. Else none."""
    if path.suffix != ".safetensors":
        return ()
    status = path.stat()
    return _parsed(path, status.st_size, status.st_mtime_ns)
