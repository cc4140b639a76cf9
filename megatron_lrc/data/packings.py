"""Packed files as one stream of plain bytes: .gz, .bz2, .xz, .zst and .zstd.

A file may hold several packed streams end to end, as parallel packers and tools that append write them: all are
read. Anything after a stream that is not another one is damage, and so is a stream that breaks off. (The readers of
bz2, lzma and zstandard themselves end in silence at the former or the latter.)

A few packed bytes may stand for gigabytes, so they are unpacked a little at a time, and the memory that a file asks
for to be unpacked with is bounded: by what the tools take that do not ask (zstd, xz), or by the size of the file.
"""

import bz2
import contextlib
import gzip
import importlib
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

from megatron_lrc.config import ConfigError

PACKINGS = (".gz", ".bz2", ".xz", ".zst", ".zstd")
_PACKED_BYTES, _UNPACKED_BYTES = 1 << 15, 1 << 20  # at a time
#: Of zstd given to its decompressor at a time, whose output has no other bound: 4 bytes may stand for 128 KiB.
_ZSTD_BYTES = 1 << 8
#: Bytes that a packed file may ask for to be unpacked with: zstd's bound without --long, and its largest.
_LEAST_WINDOW, _LARGEST_WINDOW = 1 << 27, 1 << 31


def unpacked(path: str, raw: IO[bytes]) -> IO[bytes]:
    """The file's bytes, unpacked as its suffix says. Reading raises what `damage_named` names."""
    name = path.lower()
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    window = min(max(_LEAST_WINDOW, os.path.getsize(path)), _LARGEST_WINDOW)
    if name.endswith(".bz2"):
        return _buffered(_Streams(raw, bz2.BZ2Decompressor, OSError))
    if name.endswith(".xz"):
        new_stream = partial(lzma.LZMADecompressor, memlimit=window)
        return _buffered(_Streams(raw, new_stream, lzma.LZMAError, padding=b"\0"))
    if name.endswith((".zst", ".zstd")):
        zstandard = import_for(path, "zstandard")
        decompressor = zstandard.ZstdDecompressor(max_window_size=window)
        return _buffered(_Streams(raw, lambda: _ZstdStream(decompressor.decompressobj()), zstandard.ZstdError))
    return raw


@contextlib.contextmanager
def damage_named(path: str) -> Iterator[None]:
    """One sentence, a ConfigError, for an archive that breaks off or is none."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        if "memory" in str(error).lower():
            raise ConfigError(
                f"{path} takes more than {_LEAST_WINDOW >> 20} MiB of memory to unpack ({error}), which only files "
                "are allowed that are themselves as large. Unpack it, or pack it again with a smaller window."
            ) from error
        raise ConfigError(
            f"{path} is damaged, or not packed as its name says ({error}). Get the file again, or leave it out."
        ) from error


def import_for(path: str, package: str) -> Any:
    """The package, or a ConfigError that says how to get what this file needs."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise ConfigError(f"{path} needs the package {name}. Install it: pip install {name}") from None


def _buffered(streams: "_Streams") -> IO[bytes]:
    return io.BufferedReader(streams, 1 << 20)


class _Streams(io.RawIOBase):
    """All packed streams of a file, one after the other. EOFError for damage.

    new_stream: makes an object with `decompress(bytes, max_length)`, `needs_input`, `eof` and `unused_data`, as
    `bz2.BZ2Decompressor` is one. damage: what its `decompress` raises. padding: a byte that may be repeated after a
    stream (.xz allows it).
    """

    def __init__(self, raw: IO[bytes], new_stream: Callable[[], Any], damage: type[Exception], padding: bytes = b""):
        self._raw, self._new_stream, self._damage, self._padding = raw, new_stream, damage, padding
        self._stream: Any = None  # that has not ended yet
        self._is_after_stream = False
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            if self._stream is None or self._stream.needs_input:
                self._packed = self._packed or self._raw.read(_PACKED_BYTES)
                if not self._packed:
                    if self._stream is not None:
                        raise EOFError("it breaks off")
                    return 0
            self._unpack()
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size

    def _unpack(self) -> None:
        if self._stream is None and self._is_after_stream and self._padding:
            self._packed = self._packed.lstrip(self._padding)
            if not self._packed:
                return
        self._stream = self._stream or self._new_stream()
        try:
            self._unpacked = memoryview(self._stream.decompress(self._packed, _UNPACKED_BYTES))
        except (self._damage, MemoryError) as error:
            raise EOFError(str(error) or "out of memory") from error
        self._packed = b""
        if self._stream.eof:
            self._packed, self._stream, self._is_after_stream = self._stream.unused_data, None, True


class _ZstdStream:
    """zstandard's decompressor with the interface of bz2's. Of `max_length` it knows only that little is wanted."""

    def __init__(self, decompressor: Any):
        self._decompressor, self._packed = decompressor, memoryview(b"")

    @property
    def needs_input(self) -> bool:
        return not self._packed

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data + bytes(self._packed)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """max_length: for one of several calls that data takes, about."""
        self._packed = memoryview(data) if data else self._packed
        unpacked, length = [], 0
        while self._packed and length < max_length and not self.eof:
            some, self._packed = self._packed[:_ZSTD_BYTES], self._packed[_ZSTD_BYTES:]
            unpacked.append(self._decompressor.decompress(some))
            length += len(unpacked[-1])
        return b"".join(unpacked)
