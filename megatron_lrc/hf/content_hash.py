"""A hash over every byte of a model's files, as a tree over chunks of fixed size.

    root    sha256 over config.json's values and each file's name and sha256
    file    sha256 over its size and the sha256 of its chunks, in order
    chunk   sha256 of 16 MiB of the file; the last one may be shorter

So whoever hashes which chunk, one thread or all ranks of a node, the root is the same. While the bytes are in
memory, `constant_tensors.py` looks for tensors that hold one value only. Needs no torch.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrc.config import ConfigError
from megatron_lrc.hf.constant_tensors import Piece, constant_pieces

CHUNK_BYTES = 2**24
#: Begins every hash of this kind; a fingerprint without it was made by an earlier version (`sampled_hash.py`).
PREFIX = "tree-"
_MOST_THREADS = 4  # of one process; a disk is seldom faster than that


@dataclass(frozen=True, slots=True)
class Chunk:
    """sha256: of its bytes, in hex. constant: what is constant in it, by tensor."""

    sha256: str
    constant: dict[str, Piece]

    def to_list(self) -> list[Any]:
        """As JSON has it."""
        return [self.sha256, {name: list(piece) for name, piece in self.constant.items()}]

    @classmethod
    def of_list(cls, values: Any) -> "Chunk":
        """The inverse. ValueError, TypeError, AttributeError for anything else."""
        sha256, constant = values
        if len(bytes.fromhex(sha256)) != hashlib.sha256().digest_size:
            raise ValueError(f"{sha256} is no sha256")
        return cls(sha256, {str(name): Piece(str(value), int(length)) for name, (value, length) in constant.items()})


@dataclass(frozen=True, slots=True)
class FileContents:
    """What a file holds. size in bytes."""

    size: int
    chunks: tuple[Chunk, ...]

    @property
    def sha256(self) -> str:
        lines = [str(self.size), *(chunk.sha256 for chunk in self.chunks)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def pieces(self) -> list[tuple[int, dict[str, Piece]]]:
        """(bytes, what is constant in them) of each chunk."""
        sizes = (min(CHUNK_BYTES, self.size - start) for start in range(0, self.size, CHUNK_BYTES))
        return [(size, chunk.constant) for size, chunk in zip(sizes, self.chunks, strict=True)]


@dataclass(frozen=True, slots=True)
class Work:
    """One chunk to hash: `length` bytes of `path` from `start` on."""

    path: Path
    start: int
    length: int


def root_of(config_values: Mapping[str, Any], files: Mapping[Path, FileContents]) -> str:
    """PREFIX and the hash of a model, wherever it lies."""
    named = sorted((path.name, contents.sha256) for path, contents in files.items())
    return PREFIX + hashlib.sha256(json.dumps([dict(config_values), named], sort_keys=True).encode()).hexdigest()


def hash_files(paths: Iterable[Path]) -> dict[Path, FileContents]:
    """Read all of these files now, by this process alone. ConfigError where one cannot be read."""
    sizes = {path: path.stat().st_size for path in paths}
    return assemble(sizes, hash_chunks(plan(sizes)))


def plan(sizes: Mapping[Path, int]) -> list[Work]:
    """The chunks of these files, in the order in which `assemble` wants them back."""
    return [
        Work(path, start, min(CHUNK_BYTES, size - start))
        for path, size in sizes.items()
        for start in range(0, size, CHUNK_BYTES)
    ]


def assemble(sizes: Mapping[Path, int], chunks: Sequence[Chunk]) -> dict[Path, FileContents]:
    """The files that these chunks, ordered as `plan` has them, make up."""
    found, rest = {}, iter(chunks)
    for path, size in sizes.items():
        found[path] = FileContents(size, tuple(next(rest) for _ in range(0, size, CHUNK_BYTES)))
    return found


def hash_chunks(work: Sequence[Work], *, sharers: int = 1) -> list[Chunk]:
    """Read and hash in threads; both let go of the interpreter. sharers: processes that share the CPUs."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(_MOST_THREADS, max(1, cpus // sharers))) as threads:
        return list(threads.map(_hash, work))


def _hash(work: Work) -> Chunk:
    try:
        data = _read(work)
        return Chunk(hashlib.sha256(data).hexdigest(), constant_pieces(work.path, memoryview(data), work.start))
    except OSError as error:
        raise ConfigError(f"{work.path} cannot be read ({error}). Check the disk, or copy the file again.") from error


def _read(work: Work) -> bytearray:
    data = bytearray(work.length)
    with open(work.path, "rb", buffering=0) as file:
        file.seek(work.start)
        view, filled = memoryview(data), 0
        while filled < work.length:
            if not (count := file.readinto(view[filled:])):
                raise OSError("it was cut short meanwhile")
            filled += count
    return data
