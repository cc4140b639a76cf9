"""PREFIX.mask: one bit for each token of a dataset, 1 where the token counts in the losses as a label.

Of chats these are the assistant's tokens; of documents that are no chats all. Only a dataset with a chat has the file,
which stands beside megatron-core's .bin and .idx and changes nothing of them.

    32 bytes   b"LRCMASK\\0" | version u64 = 1 | tokens u64 | tokens that count u64; little-endian
    then       token n is bit n % 8, counted from the lowest, of byte n // 8; unused bits of the last byte are 0

The manifest has the tokens that count and the CRC-32 of the whole file: `"mask": {"counted_tokens": N, "crc32": X}`. A
dataset whose manifest names it is refused without it, since training would count every token in silence.
"""

import os
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from megatron_lrc.config import ConfigError
from megatron_lrc.data.mapped_files import map_array

HEADER = struct.Struct("<8sQQQ")
MAGIC, VERSION = b"LRCMASK\0", 1
#: The entry of a manifest.
ENTRY = "mask"
_PIECE = 1 << 22  # bytes read, or tokens packed, together
_REMEDY = "Copy it again with the other files of the dataset, or write the dataset again with tools/preprocess_data.py."


@dataclass(frozen=True)
class AssistantMask:
    """The file of one dataset, memory-mapped where it is asked for its bits."""

    path: str
    num_tokens: int
    num_counted: int
    crc32: int

    @cached_property
    def _bytes(self) -> numpy.ndarray:
        return map_array(self.path, numpy.uint8, (_num_bytes(self.num_tokens),), HEADER.size)

    def bits(self, start: int, length: int) -> numpy.ndarray:
        """[length], bool: whether tokens `start` and on count."""
        first = start // 8
        packed = self._bytes[first : _num_bytes(start + length)]
        return numpy.unpackbits(packed, bitorder="little")[start - 8 * first :][:length].astype(bool)

    def check(self) -> None:
        """ConfigError unless every byte is what was written. Reads all of them."""
        if _crc32_of(self.path) != self.crc32:
            raise ConfigError(f"{self.path} is damaged: its checksum is not the manifest's. {_REMEDY}")


def open_mask(prefix: str, manifest: dict[str, Any] | None, num_tokens: int) -> AssistantMask | None:
    """The mask of a dataset, or None where it has none. ConfigError where file, manifest and dataset differ."""
    path, entry = f"{prefix}.mask", (manifest or {}).get(ENTRY)
    header = _read_header(path)
    if entry is None:
        if header[:1] == (MAGIC,):
            raise ConfigError(
                f"{path} says which tokens count in the losses, but {prefix}.json "
                f"{'does not name it' if manifest else 'is not there'}: they belong to different datasets. Copy all "
                "files of the dataset again, or remove the .mask to train on every token."
            )
        return None
    mask = AssistantMask(path, num_tokens, entry["counted_tokens"], entry["crc32"])
    if not header:
        raise ConfigError(
            f"{path} is missing or no such file, and {prefix}.json says that it names the tokens that count in the "
            f"losses. {_REMEDY}"
        )
    size, expected = os.path.getsize(path), HEADER.size + _num_bytes(num_tokens)
    if header != (MAGIC, VERSION, num_tokens, mask.num_counted) or size != expected:
        raise ConfigError(
            f"{path} is not the mask of {prefix}: it has {size} bytes for {header[2]} tokens, {header[3]} of which "
            f"count, where the dataset has {num_tokens} tokens ({expected} bytes) and its manifest {mask.num_counted}. "
            f"{_REMEDY}"
        )
    return mask


def check_entry(manifest: dict[str, Any]) -> None:
    """TypeError, KeyError where a manifest has an entry of another kind than was written."""
    if (entry := manifest.get(ENTRY)) is None:
        return
    if not isinstance(entry, dict) or not all(
        type(entry[name]) is int and entry[name] >= 0 for name in ("counted_tokens", "crc32")
    ):
        raise TypeError(f"{ENTRY} is of another kind")


def describe_counted(num_counted: int, num_tokens: int, where: str) -> str:
    """A line of a report."""
    share = num_counted / num_tokens if num_tokens else 0.0
    return (
        f"{num_counted:,} of {num_tokens:,} tokens {where} count in the losses ({share:.1%}): of chats the assistant's"
    )


class MaskWriter:
    """Appends to a mask file. A process that goes on with it has the `tail` of the one before.

    num_tokens: those written already. tail: the bits of the last of them that fill no byte, as an integer.
    """

    def __init__(self, path: str, *, num_tokens: int = 0, num_counted: int = 0, tail: int = 0):
        self.path, self.num_tokens, self.num_counted = path, num_tokens, num_counted
        self._tail = numpy.unpackbits(numpy.array([tail], numpy.uint8), bitorder="little")[: num_tokens % 8]
        self.file = open(path, "ab")  # noqa: SIM115  open until `close`
        size = HEADER.size + num_tokens // 8 if num_tokens else 0
        if os.path.getsize(path) < size:
            self.file.close()
            raise ConfigError(
                f"{path} is shorter than its progress file says. Delete the .partial files and the .unfinished.json "
                "beside it to start anew."
            )
        self.file.truncate(size)
        if not size:
            self.file.write(bytes(HEADER.size))  # filled in by `complete`

    @property
    def tail(self) -> int:
        return int(numpy.packbits(self._tail, bitorder="little")[0]) if len(self._tail) else 0

    def add(self, bits: numpy.ndarray) -> None:
        """bits: [tokens], bool."""
        joined = numpy.concatenate([self._tail, bits.astype(numpy.uint8)])
        whole = len(joined) // 8 * 8
        self.file.write(numpy.packbits(joined[:whole], bitorder="little").tobytes())
        self._tail = joined[whole:]
        self.num_tokens += len(bits)
        self.num_counted += int(bits.sum())

    def add_all(self, num_tokens: int) -> None:
        """So many tokens that count."""
        for start in range(0, num_tokens, _PIECE):
            self.add(numpy.ones(min(_PIECE, num_tokens - start), dtype=bool))

    def complete(self) -> dict[str, int]:
        """Ends and closes the file. Gives the manifest's entry."""
        if len(self._tail):
            self.file.write(bytes([self.tail]))
        self.file.flush()
        with open(self.path, "r+b") as file:
            file.write(HEADER.pack(MAGIC, VERSION, self.num_tokens, self.num_counted))
            file.flush()
            os.fsync(file.fileno())
        self.file.close()
        return {"counted_tokens": self.num_counted, "crc32": _crc32_of(self.path)}


def _num_bytes(num_tokens: int) -> int:
    return -(-num_tokens // 8)


def _read_header(path: str) -> tuple[Any, ...]:
    """Its four fields; none where there is no such file, or something else."""
    try:
        with open(path, "rb") as file:
            start = file.read(HEADER.size)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return ()
    return HEADER.unpack(start) if len(start) == HEADER.size else ()


def _crc32_of(path: str) -> int:
    checksum = 0
    with Path(path).open("rb") as file:
        while piece := file.read(_PIECE):
            checksum = zlib.crc32(piece, checksum)
    return checksum
