"""What a model's files were found to hold, kept beside them, so that a run that starts again need not read them all.

The entry of a file counts as long as real path, size, inode and the times of its last changes are what they
were. A bit that flips on the disk changes none of them: exports do not look here. Where the directory cannot
be written to there is no cache; one that is not to the character what was written, by a checksum of its own, is
as good as none. (Whoever can forge that can forge the weights.)
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrc.hf.content_hash import CHUNK_BYTES, Chunk, FileContents
from megatron_lrc.json_files import read_json
from megatron_lrc.whole_files import write_whole

CACHE_FILE = ".megatron_lrc_hashes.json"
_FORMAT = 2
#: A file that changed less than this before it was read may change again without another time: file systems count
#: in steps of up to 2 s. It is not remembered, as git does not trust such an entry of its index.
_RACY_NS = 2 * 10**9


@dataclass(frozen=True, slots=True)
class FileState:
    """Which state of a file was read. seen: when it was looked at, just before. Times in ns."""

    real_path: str
    size: int
    modified: int
    changed: int
    inode: int
    device: int  # of this start of the machine, so not remembered
    seen: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        seen, status = time.time_ns(), path.stat()
        real = os.path.realpath(path)
        return cls(real, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev, seen)

    @property
    def is_settled(self) -> bool:
        """Whether a later change would show in the times."""
        return self.seen - max(self.modified, self.changed) > _RACY_NS

    @property
    def key(self) -> list[Any]:
        return [self.real_path, self.size, self.modified, self.changed, self.inode]


def read_cache(directory: Path, states: Mapping[Path, FileState]) -> dict[Path, FileContents]:
    """What is known of these files."""
    try:
        entries = _entries_of(directory / CACHE_FILE)
        known = {tuple(key): contents_of(chunks, size=key[1]) for key, chunks in entries}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError):
        return {}
    return {path: known[key] for path, state in states.items() if (key := tuple(state.key)) in known}


def write_cache(directory: Path, states: Mapping[Path, FileState], found: Mapping[Path, FileContents]) -> None:
    """Remember the files that lay still while they were read. No error where that cannot be written."""
    settled = {path: state for path, state in states.items() if state.is_settled and _is_as_before(path, state)}
    entries = [[state.key, [chunk.to_list() for chunk in found[path].chunks]] for path, state in settled.items()]
    try:
        if entries:
            write_whole(directory / CACHE_FILE, cache_text(entries))
    except OSError:
        pass  # a directory of somebody else's, or a full disk: the next start reads the files again


def cache_text(entries: list[Any]) -> str:
    """The file for these entries: (`FileState.key`, chunks as JSON) of each file of weights."""
    checksum = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return json.dumps({"format": _FORMAT, "sha256": checksum, "files": entries}) + "\n"


def _entries_of(path: Path) -> list[Any]:
    """The inverse. ValueError, TypeError, KeyError for a text that is not one of these."""
    entries = read_json(path)["files"]
    if cache_text(entries) != path.read_text(encoding="utf-8"):
        raise ValueError("damaged, or of another format")
    return entries


def contents_of(chunks: list[Any], *, size: int) -> FileContents:
    """From JSON. ValueError, TypeError, AttributeError for what is not the chunks of a file of this size."""
    if len(chunks) != len(range(0, size, CHUNK_BYTES)):
        raise ValueError(f"{len(chunks)} chunks of {size} bytes")
    return FileContents(size, tuple(Chunk.of_list(chunk) for chunk in chunks))


def _is_as_before(path: Path, state: FileState) -> bool:
    try:
        return FileState.of(path).key == state.key
    except OSError:
        return False
