"""Where documents come from: which files an --input means, and how each kind of file gives raw JSON lines.

    .jsonl, .json        one object per line; also .gz and .zst of them
    .parquet             one document per row; columns are the keys
    .txt                 the whole file is one document, under the first key; also .gz and .zst

Whatever the kind, workers receive chunks of JSON lines (`encoding.py`), so there is one place where text is parsed and
one kind of message. Reading is a stream: memory stays flat, but for a .txt file, which is a document.
"""

import contextlib
import glob
import gzip
import importlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from megatron_lrc.config import ConfigError

PACKINGS = (".gz", ".zst")
KINDS = (".jsonl", ".json", ".parquet", ".txt")


def kind_of(path: str) -> str | None:
    """The suffix that says what is in a file, without its packing; None for a file of no kind that is read."""
    stem, suffix = os.path.splitext(path.lower())
    inner = os.path.splitext(stem)[1] if suffix in PACKINGS else suffix
    return inner if inner in KINDS and not (suffix in PACKINGS and inner == ".parquet") else None


def find_files(inputs: Iterable[str]) -> list[str]:
    """The files that paths, folders and patterns mean: each input in turn, a folder's and a pattern's sorted by path.

    A file named as such may have any suffix (JSON lines, if it is none of the kinds); in a folder, searched with all
    that is below it, other files are passed over. ConfigError if an input means no file, or one file is meant twice.
    """
    found: list[str] = []
    for item in inputs:
        if os.path.isdir(item):
            inside = (os.path.join(folder, name) for folder, _, names in os.walk(item) for name in names)
            files = sorted(path for path in inside if kind_of(path))
            missing = f"the folder holds no {', '.join(KINDS)} file"
        elif os.path.isfile(item):
            files, missing = [item], ""
        else:
            files = sorted(path for path in glob.glob(item, recursive=True) if os.path.isfile(path))
            missing = "there is no such file, and as a pattern it matches none"
        if not files:
            raise ConfigError(f"--input {item}: {missing}. Give files, folders or quoted patterns such as 'data/*.gz'.")
        found += files
    twice = {path for path in found if found.count(path) > 1} if len(set(found)) < len(found) else set()
    if twice:
        raise ConfigError(f"--input gives {min(twice)} more than once. Its documents would count twice; give it once.")
    return found


def is_divisible(path: str) -> bool:
    """Whether lines can be found from any byte of the file on."""
    return not path.lower().endswith(PACKINGS) and kind_of(path) not in (".parquet", ".txt")


class Source:
    """The documents of one file that is not divisible, as JSON lines; iterate once.

    skip_lines: lines that are passed over. keys: which columns of a table are wanted; the first is a text's.
    ConfigError for what cannot be unpacked or read as a table. Lines are not parsed here.
    """

    def __init__(self, path: str, keys: list[str], skip_lines: int = 0):
        self.path, self._keys, self._skip_lines = path, keys, skip_lines
        self.size = os.path.getsize(path)
        self._position: Callable[[], int] = lambda: 0

    @property
    def position(self) -> int:
        """Bytes of the file on disk that have been read so far, about."""
        return self._position()

    def __iter__(self) -> Iterator[bytes]:
        return itertools.islice(self._lines(), self._skip_lines, None)

    def _lines(self) -> Iterator[bytes]:
        kind = kind_of(self.path)
        if kind == ".parquet":
            yield from self._table_rows()
            return
        with open(self.path, "rb") as raw, _damage_named(self.path):
            self._position = raw.tell
            file = unpacked(self.path, raw)
            if kind == ".txt":
                yield _as_json_line(file.read(), self._keys[0])
            else:
                yield from file
            self._position = lambda: self.size  # the file is about to be closed

    def _table_rows(self) -> Iterator[bytes]:
        parquet = _import_for(self.path, "pyarrow.parquet")
        arrow_error: Any = _import_for(self.path, "pyarrow").ArrowException
        rows_read = 0
        try:
            with parquet.ParquetFile(self.path) as table:
                names, num_rows = table.schema_arrow.names, max(table.metadata.num_rows, 1)
                missing = [key for key in self._keys if key not in names]
                if missing:
                    raise ConfigError(
                        f"{self.path} has no column {missing[0]!r}; its columns are {', '.join(names)}. "
                        "Name the columns with --json-keys."
                    )
                self._position = lambda: self.size * rows_read // num_rows
                for batch in table.iter_batches(batch_size=256, columns=self._keys):
                    rows_read += batch.num_rows
                    yield from (json.dumps(row, default=str).encode() for row in batch.to_pylist())
        except (arrow_error, OSError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{self.path} cannot be read as a parquet file ({reason}).") from error


def unpacked(path: str, raw: IO[bytes]) -> IO[bytes]:
    """The file's bytes, unpacked as its suffix says."""
    if path.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.lower().endswith(".zst"):
        decompressor = _import_for(path, "zstandard").ZstdDecompressor(max_window_size=2**31)
        return io.BufferedReader(_ZstdFrames(raw, decompressor), 1 << 20)
    return raw


class _ZstdFrames(io.RawIOBase):
    """All frames of a zstd file. EOFError if the last one breaks off: zstandard's own reader ends there in silence."""

    def __init__(self, raw: IO[bytes], decompressor: Any):
        self._raw, self._decompressor = raw, decompressor
        self._frame: Any = None
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._raw.read(1 << 17)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it breaks off")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._unpacked = memoryview(self._frame.decompress(self._packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size


@contextlib.contextmanager
def _damage_named(path: str) -> Iterator[None]:
    """One sentence for an archive that breaks off or is none."""
    try:
        yield
    except Exception as error:
        is_zstd = type(error).__name__ == "ZstdError"  # of a package that may not be there
        if not is_zstd and not isinstance(error, gzip.BadGzipFile | EOFError | zlib.error):
            raise
        raise ConfigError(
            f"{path} is damaged, or not packed as its name says ({error}). Get the file again, or leave it out."
        ) from error


def _as_json_line(text: bytes, key: str) -> bytes:
    """Bytes that are no UTF-8 stay as they are: whoever parses the line says so, by the rule for bad lines."""
    try:
        return json.dumps({key: text.decode("utf-8")}).encode()
    except UnicodeDecodeError:
        return text


def _import_for(path: str, package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise ConfigError(f"{path} needs the package {name}. Install it: pip install {name}") from None
