"""One indexed dataset while it is being made: PREFIX.bin.partial and PREFIX.lengths.partial, then the final files.

Only appended to, so that a process that was killed leaves a good beginning and maybe something behind it: whoever goes
on cuts both files to the sizes it knows to be good. The .idx takes its final name last: where one stands, all is there.
"""

import contextlib
import fcntl
import json
import os
import warnings
from typing import Any

import numpy

from megatron_lrc.config import ConfigError


class DatasetWriter:
    """Takes documents in order; `complete` ends the files, `publish` gives them their final names.

    counts: the `counts` of an earlier process's writer, whose files are gone on with; what it left beyond is dropped.
    ConfigError if another process is writing them.
    """

    def __init__(self, prefix: str, vocab_size: int, counts: dict[str, int] | None = None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # megatron-core's remarks on absent GPU libraries do not concern this tool
            from megatron.core.datasets.indexed_dataset import DType
        self.prefix = prefix
        self.dtype = DType.optimal_dtype(vocab_size)
        counts = counts or {}
        self.documents, self.tokens = counts.get("documents", 0), counts.get("tokens", 0)
        self.empty = counts.get("empty", 0)
        self._partial = {suffix: f"{prefix}{suffix}.partial" for suffix in (".bin", ".lengths", ".json", ".idx")}
        self._bin = self._open(".bin", self.tokens * numpy.dtype(self.dtype).itemsize)
        self._lengths = self._open(".lengths", self.documents * 4)

    def _open(self, suffix: str, size: int) -> Any:
        """The partial file, `size` bytes of it kept, for this process alone."""
        file = open(self._partial[suffix], "ab")  # noqa: SIM115  open until `close`
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
        except OSError:
            file.close()
            raise ConfigError(
                f"{self._partial[suffix]} is being written by another process. Wait for it, or use another "
                "--output-prefix."
            ) from None
        if os.path.getsize(file.name) < size:
            file.close()
            raise ConfigError(
                f"{self._partial[suffix]} is shorter than its progress file says. Delete the .partial files and the "
                ".unfinished.json beside it to start anew."
            )
        file.truncate(size)
        return file

    @property
    def counts(self) -> dict[str, int]:
        return {"documents": self.documents, "tokens": self.tokens, "empty": self.empty}

    def add(self, tokens: numpy.ndarray, lengths: list[int]) -> None:
        """Appends documents. Those without a token are counted and left out: megatron-core's datasets need none."""
        self._bin.write(tokens.astype(self.dtype).tobytes())
        kept = numpy.array([length for length in lengths if length], dtype=numpy.int32)
        self._lengths.write(kept.tobytes())
        self.documents += len(kept)
        self.tokens += len(tokens)
        self.empty += len(lengths) - len(kept)

    def sync(self) -> None:
        """Puts all that was added on the disk, whatever happens to the machine."""
        for file in (self._bin, self._lengths):
            file.flush()
            os.fsync(file.fileno())

    def complete(self, manifest: dict[str, Any]) -> None:
        """Writes the index and the manifest, under temporary names still."""
        from megatron.core.datasets.indexed_dataset import _IndexWriter

        self.sync()
        lengths = numpy.fromfile(self._partial[".lengths"], dtype=numpy.int32).tolist()
        with _IndexWriter(self._partial[".idx"], self.dtype) as index:
            index.write(lengths, None, numpy.arange(len(lengths) + 1))
        with open(self._partial[".json"], "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2)
            file.write("\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: what is known to be good is there already
            self._bin.close()
        with contextlib.suppress(OSError):
            self._lengths.close()

    def discard(self) -> None:
        """Removes whatever is not under a final name."""
        self.close()
        for path in self._partial.values():
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def publish(prefix: str) -> None:
    """Gives a complete dataset its final names. May be done again after a crash in the middle of it.

    An older .idx goes first, so that it never stands beside newer data.
    """
    if os.path.exists(f"{prefix}.bin.partial"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{prefix}.idx")
    for suffix in (".bin", ".json", ".idx"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{prefix}{suffix}.partial", f"{prefix}{suffix}")
    with contextlib.suppress(FileNotFoundError):
        os.remove(f"{prefix}.lengths.partial")


def make_folder_of(prefix: str) -> None:
    """ConfigError if the folder that --output-prefix lies in cannot be made."""
    folder = os.path.dirname(prefix)
    try:
        os.makedirs(folder or ".", exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output-prefix {prefix}: cannot make the folder {folder} ({error.strerror}).") from error
