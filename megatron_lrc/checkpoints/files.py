"""Writes one rank's files of a checkpoint: to disk, read back, their CRC-32 compared. Needs torch only.

So a process that does nothing else (`background_writer.py`) can do it without loading megatron-core.
"""

import contextlib
import io
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class FileSum:
    """size in bytes; crc32 of the contents: enough against damage, which is what it is for."""

    size: int
    crc32: int

    @classmethod
    def of(cls, path: Path) -> "FileSum":
        size = crc32 = 0
        with open(path, "rb") as file:
            while piece := file.read(_READ_BYTES):
                size, crc32 = size + len(piece), zlib.crc32(piece, crc32)
        return cls(size, crc32)


#: Of one file: path, name in the checkpoint, and what goes into it: (index, BytesIO) of objects, (index, tensor); the
#: indices are torch's (MetadataIndex).
Bucket = tuple[str, str, tuple[list[tuple], list[tuple]]]

#: What megatron-core wants to know of the files, by their place; or what failed. And the sums of the files, by name.
Written = tuple[dict[int, list[WriteResult]] | str, dict[str, FileSum]]


def write_files(buckets: list[Bucket]) -> Written:
    """Write this rank's files. Does not raise for what a disk does: the first of the two is then a few words."""
    written, sums = {}, {}
    try:
        for place, (path, name, (objects, tensors)) in enumerate(buckets):
            written[place], sums[name] = _write_file(Path(path), name, [*objects, *tensors])
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch makes of a failed write
        return reason(error), {}
    return written, sums


class _Summing:
    """What torch.save needs of a file, adding up the CRC-32 of what goes by."""

    def __init__(self, file: IO[bytes]):
        self._file, self.size, self.crc32 = file, 0, 0

    def write(self, content: Any) -> int:
        self.crc32 = zlib.crc32(content, self.crc32)
        self.size += memoryview(content).nbytes
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()


def _write_file(path: Path, name: str, items: list[tuple]) -> tuple[list[WriteResult], FileSum]:
    """Write objects and tensors one after the other, bring them to disk, and read them back."""
    results = []
    with open(path, "wb", buffering=0) as raw, io.BufferedWriter(raw) as file:
        stream = _Summing(file)
        for index, content in items:
            start = stream.size
            if isinstance(content, io.BytesIO):
                stream.write(content.getbuffer())
            else:
                torch.save(content, stream)  # type: ignore[arg-type] (it only writes)
            place = _StorageInfo(name, start, stream.size - start)
            results.append(WriteResult(index=index, size_in_bytes=place.length, storage_data=place))
        file.flush()
        os.fsync(raw.fileno())
        with contextlib.suppress(OSError):  # so that the disk is read, not the cache; where the file system can
            os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    written = FileSum(stream.size, stream.crc32)
    if FileSum.of(path) != written:
        raise OSError(f"{path} does not read back as it was written: the disk is failing")
    return results, written


def reason(error: Exception) -> str:
    """A failed write, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return error.strerror + where
    return str(error).partition("\n")[0]
