"""Holds the header of a GGUF file against its length, and its sizes against its tensors, before anybody follows them.

The package gguf and transformers believe what a header says: a damaged count has the one read on for ever behind the
end of the file, and the other make a model of a billion layers.

    "GGUF" | version u32 | number of tensors u64 | of fields u64
           | each field: name, type u32, value; an array: type of its elements u32, their number u64, the elements
           | each tensor: name, number of sizes u32, sizes u64, type u32, offset u64
    A text is its length, u64, and its bytes.
"""

import mmap
import re
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

_VERSIONS = (2, 3)
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by type of a value
_TEXT, _ARRAY = 8, 9
_MOST_DIMS = 4
_OPTIONAL = ("vocab_size", "attention.head_count_kv")
_LAYER = re.compile(r"blk\.(\d{1,9})\.")


def check_header(path: Path) -> None:
    """ValueError, with the reason, where a header ends behind the file's end or says what no header may. OSError."""
    with open(path, "rb") as file:
        if not file.read(1):
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                _Walk(content).walk()
            except struct.error:
                raise ValueError("its header is longer than the file") from None


def check_sizes(contents: Any, architecture: str) -> None:
    """ValueError where the sizes that a model is made by are not those of the tensors. contents: its `GGUFReader`."""
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in contents.tensors}
    hidden, vocabulary = _matrix(shapes, "token_embd.weight")
    heads = _number(contents, f"{architecture}.attention.head_count") or 0
    said: dict[str, Callable[[int], bool]] = {
        "block_count": lambda size: size == 1 + max([int(found[1]) for found in map(_LAYER.match, shapes) if found]),
        "embedding_length": lambda size: size == hidden,
        "feed_forward_length": lambda size: size == _matrix(shapes, "blk.0.ffn_up.weight")[1],
        "vocab_size": lambda size: size == vocabulary,
        "attention.head_count": lambda size: size > 0 and _matrix(shapes, "blk.0.attn_q.weight")[1] % size == 0,
        "attention.head_count_kv": lambda size: size > 0 and heads % size == 0,
    }
    for name, is_right in said.items():
        size = _number(contents, f"{architecture}.{name}")
        if size is None and name not in _OPTIONAL:  # transformers would make a model of its class's default sizes
            raise ValueError(f"it has no {architecture}.{name}")
        if size is not None and not is_right(size):
            raise ValueError(f"{architecture}.{name} is {size}, and its tensors have another size")


def _matrix(shapes: dict[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    """Its sizes, columns first, as GGUF has them."""
    if len(shape := shapes.get(name, ())) != 2:
        raise ValueError(f"{name} is no matrix of it")
    return shape[0], shape[1]


def _number(contents: Any, name: str) -> int | None:
    if (field := contents.fields.get(name)) is None:
        return None
    if type(value := field.contents()) is not int:
        raise ValueError(f"{name} is no number")
    return value


class _Walk:
    """Goes over a header. struct.error at the end of the file."""

    def __init__(self, content: mmap.mmap):
        self._content, self._place = content, 0

    def walk(self) -> None:
        magic, version, tensors, fields = self._take("<4sIQQ")
        if magic != b"GGUF" or version not in _VERSIONS:
            raise ValueError(f"it begins with {magic!r} and version {version}, not with b'GGUF' and 2 or 3")
        for _ in range(fields):  # each takes bytes, so a count too large soon meets the end
            self._text()
            self._value(*self._take("<I"))
        for _ in range(tensors):
            self._text()
            (dims,) = self._take("<I")
            sizes = self._take(f"<{dims}Q") if 0 < dims <= _MOST_DIMS else ()
            if not 0 < prod(sizes) < 1 << 48 or not sizes:
                raise ValueError("a tensor has impossible sizes")
            self._skip(12)

    def _value(self, kind: int) -> None:
        if kind == _TEXT:
            self._text()
        elif kind != _ARRAY:
            self._skip(self._size(kind))
        else:
            kind, count = self._take("<IQ")
            if kind != _TEXT:
                self._skip(count * self._size(kind))
                return
            for _ in range(count):
                self._text()

    def _size(self, kind: int) -> int:
        if kind not in _BYTES:
            raise ValueError(f"a field has the type {kind}")
        return _BYTES[kind]

    def _text(self) -> None:
        (length,) = self._take("<Q")
        self._skip(length)

    def _take(self, form: str) -> tuple:
        values = struct.unpack_from(form, self._content, self._place)
        self._place += struct.calcsize(form)
        return values

    def _skip(self, count: int) -> None:
        self._place += count
        if self._place > len(self._content):
            raise struct.error
