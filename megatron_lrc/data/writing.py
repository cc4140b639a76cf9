"""One indexed dataset while it is being made: PREFIX.bin.partial and PREFIX.lengths.partial, with chats also
PREFIX.mask.partial, then the final files.

Only appended to, so that a process that was killed leaves a good beginning and maybe something behind it:
whoever goes on cuts the files to the sizes it knows to be good. The .idx takes its final name last: where
one stands, all is there.
"""

import contextlib
import errno
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from megatron_lrc.config import ConfigError
from megatron_lrc.data.assistant_masks import ENTRY, MaskWriter
from megatron_lrc.data.indexed_files import HEADER, MAGIC, TOKEN_DTYPES, pieces
from megatron_lrc.locks import FileLock
from megatron_lrc.os_errors import explain

_SUFFIXES = (".bin", ".lengths", ".mask", ".json", ".idx")  # of partial files


class DatasetWriter:
    """Takes documents in order; `complete` ends the files, `publish` gives them their final names.

    counts: the `counts` of an earlier process's writer, whose files are gone on with; what it left beyond is
    dropped. ConfigError if another process is writing them.
    """

    def __init__(self, prefix: str, vocab_size: int, counts: dict[str, int] | None = None):
        self.prefix = prefix
        self.dtype = token_dtype(vocab_size)
        counts = counts or {}
        self.documents, self.tokens = counts.get("documents", 0), counts.get("tokens", 0)
        self.empty = counts.get("empty", 0)
        self._lock = lock_of_dataset(prefix)
        self._lock.take()
        self._partial = {suffix: f"{prefix}{suffix}.partial" for suffix in _SUFFIXES}
        try:
            self._bin = self._open(".bin", self.tokens * numpy.dtype(self.dtype).itemsize)
            self._lengths = self._open(".lengths", self.documents * 4)
            self._mask = self._open_mask(counts) if counts.get("has_mask") else None
            if self._mask is None:
                Path(self._partial[".mask"]).unlink(missing_ok=True)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, suffix: str, size: int) -> Any:
        """The partial file, `size` bytes of it kept."""
        file = open(self._partial[suffix], "ab")  # noqa: SIM115  open until `close`
        if os.path.getsize(file.name) < size:
            file.close()
            raise ConfigError(
                f"{self._partial[suffix]} is shorter than its progress file says. Delete the .partial files "
                "and the .unfinished.json beside it to start anew."
            )
        file.truncate(size)
        return file

    def _open_mask(self, counts: dict[str, int]) -> MaskWriter:
        """Of the tokens that were written before."""
        counted, tail = counts["counted"], counts["mask_tail"]
        return MaskWriter(self._partial[".mask"], num_tokens=self.tokens, num_counted=counted, tail=tail)

    @property
    def counts(self) -> dict[str, int]:
        counts = {"documents": self.documents, "tokens": self.tokens, "empty": self.empty}
        if self._mask is None:
            return counts
        return {**counts, "has_mask": 1, "counted": self._mask.num_counted, "mask_tail": self._mask.tail}

    @property
    def counted_tokens(self) -> int | None:
        """Tokens that count in the losses; None without a chat: all."""
        return None if self._mask is None else self._mask.num_counted

    def add(self, tokens: numpy.ndarray, lengths: list[int], mask: numpy.ndarray | None = None) -> None:
        """Appends documents. Those without a token are counted and left out: megatron-core's datasets need none.

        mask: [tokens], bool, whether each counts in the losses; None: all do. The file begins with the first that has
        one.
        """
        if mask is not None and self._mask is None:
            self._mask = MaskWriter(self._partial[".mask"])
            self._mask.add_all(self.tokens)
        if self._mask is not None:
            self._mask.add(numpy.ones(len(tokens), dtype=bool) if mask is None else mask)
        self._bin.write(tokens.astype(self.dtype).tobytes())
        kept = numpy.array([length for length in lengths if length], dtype=numpy.int32)
        self._lengths.write(kept.tobytes())
        self.documents += len(kept)
        self.tokens += len(tokens)
        self.empty += len(lengths) - len(kept)

    def sync(self) -> None:
        """Puts all that was added on the disk, whatever happens to the machine."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    @property
    def _files(self) -> list[Any]:
        return [self._bin, self._lengths, *([self._mask.file] if self._mask else [])]

    def complete(self, manifest: dict[str, Any]) -> None:
        """Writes the index and the manifest, under temporary names still."""
        self.sync()
        if self._mask is not None:
            manifest = {**manifest, ENTRY: self._mask.complete()}
        with open(self._partial[".idx"], "wb") as output:
            write_index([IndexPart(numpy.dtype(self.dtype), _LengthsFile(self._partial[".lengths"]))], output)
        write_manifest(self._partial[".json"], manifest)

    def close(self) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):  # a full disk: what is known to be good is there already
                file.close()
        self._lock.release()

    def discard(self) -> None:
        """Removes whatever is not under a final name."""
        for path in self._partial.values():
            Path(path).unlink(missing_ok=True)
        self.close()


@dataclass(frozen=True)
class _LengthsFile:
    """int32 values of a file, read where they are asked for: a memory map would count as this process's memory."""

    path: str

    def __len__(self) -> int:
        return os.path.getsize(self.path) // 4

    def __getitem__(self, piece: slice) -> numpy.ndarray:
        return numpy.fromfile(self.path, numpy.int32, piece.stop - piece.start, offset=4 * piece.start)


@dataclass(frozen=True)
class IndexPart:
    """Consecutive documents of an .idx: what is read by slices, be it in memory, memory-mapped or in a file."""

    dtype: numpy.dtype  # of the token ids
    lengths: numpy.ndarray | _LengthsFile  # [sequences], int32: tokens of each sequence
    bounds: numpy.ndarray | None = None  # [documents + 1], int64, as in the .idx; None: a sequence each

    @property
    def num_documents(self) -> int:
        return len(self.lengths) if self.bounds is None else len(self.bounds) - 1


def token_dtype(vocab_size: int) -> type[numpy.uint16] | type[numpy.int32]:
    """megatron-core's DType.optimal_dtype; importing that would load torch."""
    return numpy.uint16 if vocab_size < 65500 else numpy.int32


def write_index(parts: list[IndexPart], output: BinaryIO) -> None:
    """Writes the .idx of the parts' documents, end to end; all have one dtype. `indexed_files.py` draws the format.

    The bytes are those of megatron-core's IndexedDatasetBuilder. They are made here, a piece at a time,
    because the builder keeps two Python integers per sequence: about 80 bytes for each of what may be a
    billion documents.
    """
    dtype = parts[0].dtype
    code = next(code for code, name in TOKEN_DTYPES.items() if name == dtype.name)
    num_sequences = sum(len(part.lengths) for part in parts)
    num_documents = sum(part.num_documents for part in parts)
    output.write(HEADER.pack(MAGIC, 1, code, num_sequences, num_documents + 1))
    for part in parts:
        for piece in pieces(len(part.lengths)):
            output.write(part.lengths[piece].tobytes())
    position = 0
    for part in parts:
        for piece in pieces(len(part.lengths)):
            sizes = part.lengths[piece].astype(numpy.int64) * dtype.itemsize
            ends = position + numpy.cumsum(sizes)
            output.write((ends - sizes).tobytes())
            position = int(ends[-1])
    output.write(struct.pack("<q", 0))
    first = 0
    for part in parts:
        for piece in pieces(part.num_documents):
            after = slice(piece.start + 1, piece.stop + 1)
            bounds = numpy.arange(after.start, after.stop) if part.bounds is None else part.bounds[after]
            output.write((first + bounds.astype(numpy.int64)).tobytes())
        first += len(part.lengths)


def write_manifest(path: str, manifest: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def is_complete(prefix: str) -> bool:
    """Whether the index stands, which is written last: under its final name, or to be given it."""
    return os.path.exists(f"{prefix}.idx") or os.path.exists(f"{prefix}.idx.partial")


def publish(prefix: str) -> None:
    """Gives a complete dataset its final names. May be done again after a crash in the middle of it.

    An older .idx goes first, so that it never stands beside newer data, and an older .mask with it.
    """
    if os.path.exists(f"{prefix}.bin.partial"):
        for suffix in (".idx", ".mask"):
            Path(f"{prefix}{suffix}").unlink(missing_ok=True)
    for suffix in (".bin", ".mask", ".json", ".idx"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{prefix}{suffix}.partial", f"{prefix}{suffix}")
    Path(f"{prefix}.lengths.partial").unlink(missing_ok=True)


def lock_of_dataset(prefix: str) -> FileLock:
    """For whoever writes PREFIX.bin, .mask, .idx and .json."""
    path = Path(prefix)
    remedy = "Wait until it has ended, or use another --output-prefix."
    return FileLock(path.with_name(f".{path.name}.lock"), place=prefix, remedy=remedy)


def make_folder_of(prefix: str) -> None:
    """ConfigError if the folder that --output-prefix lies in cannot be made."""
    folder = os.path.dirname(prefix)
    try:
        os.makedirs(folder or ".", exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output-prefix {prefix}: cannot make the folder {folder} ({error.strerror}).") from error


def explain_os_error(error: OSError, prefix: str) -> str:
    """One sentence for what the system refused while the files of --output-prefix were written."""
    where = error.filename or f"the files of {prefix}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return explain(error, str(where))
    folder = os.path.dirname(os.path.abspath(prefix))
    return (
        f"{error.strerror}: {where} could not be written. Make room in {folder}, or use another "
        "--output-prefix, and run the command again."
    )
