"""Where documents come from: which files an --input means, and how each kind of file gives raw JSON lines.

Whatever the kind, workers receive chunks of JSON lines (`encoding.py`), so there is one place where text is parsed and
one kind of message. Reading is a stream: memory stays flat, but for a .txt file, which is a document. Of a packed
one it is bounded by the size of the file: text seldom grows as much as `_TEXT_GROWS` times.
"""

import codecs
import glob
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import IO

from megatron_lrc.config import ConfigError
from megatron_lrc.data.file_kinds import KINDS, is_hidden, kind_of, other_kind_of, suffixes_of
from megatron_lrc.data.filters import Filter
from megatron_lrc.data.lines import LONGEST_LINE, lines_of
from megatron_lrc.data.packings import PACKINGS, damage_named, unpacked
from megatron_lrc.data.tables import row_lines

_SUFFIXES_NAMED = 8  # of files that are passed over
_TEXT_GROWS = 20


def find_files(inputs: Iterable[str], report: Callable[[str], None]) -> list[str]:
    """The files that paths, folders and patterns mean: each input in turn, a folder's and a pattern's sorted by path.

    A file named as such, or matched by a pattern, may have a suffix that is not known (JSON lines, then). In a
    folder, searched with all that is below it and linked into it, such files are passed over, and so is whatever is
    hidden; of a pattern's files those of other kinds are. `report` gets a line that counts them, and one that counts
    files of no byte. ConfigError if an input means no file, a file of another kind is named, a link leads nowhere, or
    one file is meant twice, be it through a link.
    """
    found: list[str] = []
    passed_over: set[str] = set()
    for item in inputs:
        files, others = _files_of(item)
        if not files:
            missing = "there is no such file, and as a pattern it matches none"
            if os.path.isdir(item) or others:
                place = "the folder holds" if os.path.isdir(item) else "it matches"
                missing = f"{place} no {', '.join(KINDS)} file, but {_counted(others)}"
            raise ConfigError(f"--input {item}: {missing}. Give files, folders or quoted patterns such as 'data/*.gz'.")
        found += files
        passed_over |= others
    _refuse_lost_links([*found, *(path for path in sorted(passed_over) if not is_hidden(path))])
    _check_readable(found)
    _refuse_twice(found)
    if empty := [path for path in found if not os.path.getsize(path)]:
        report(f"{len(empty)} of {len(found)} files without a byte, the first being {empty[0]}")
    if passed_over := passed_over.difference(found):
        kinds = f"{', '.join(KINDS)} (or the first two and .txt packed as {', '.join(PACKINGS)})"
        report(f"passed over: {_counted(passed_over)}; read are {kinds}")
    return found


def _files_of(item: str) -> tuple[list[str], set[str]]:
    """The files that are meant, sorted, and those that are passed over."""
    if os.path.isfile(item):
        return [item], set()
    matches = [item] if os.path.isdir(item) else glob.glob(item, recursive=True)
    matched = {path for path in matches if not os.path.isdir(path)}
    below = {path for folder in matches if os.path.isdir(folder) for path in _below(folder)}
    files = {path for path in matched if not other_kind_of(path)}
    files |= {path for path in below if kind_of(path) and not is_hidden(path)}
    return sorted(files), (matched | below) - files


def _below(folder: str, inside: tuple[str, ...] = ()) -> Iterator[str]:
    """All files below a folder, and hidden folders themselves. Linked folders are entered, but not those that
    `inside`, the way here, has passed."""
    real = os.path.realpath(folder)
    if real in inside:
        return
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise ConfigError(f"The folder {folder} cannot be read ({error.strerror}). Leave it out.") from error
    for path in (os.path.join(folder, name) for name in names):
        if os.path.isdir(path) and not is_hidden(path):
            yield from _below(path, (*inside, real))
        else:
            yield path


def _counted(paths: Iterable[str]) -> str:
    """How many files of which suffixes: "12 files (.csv 9, .tar.gz 2, hidden 1)"."""
    counts = Counter("hidden" if is_hidden(path) else "".join(suffixes_of(path)) or "no suffix" for path in paths)
    by_number = sorted(counts.items(), key=lambda item: (-item[1], item[0]))  # paths come in no order
    named = [f"{suffix} {count}" for suffix, count in by_number[:_SUFFIXES_NAMED]]
    more = ["and others"] if len(counts) > _SUFFIXES_NAMED else []
    total = sum(counts.values())
    if not total:
        return "no file at all"
    return f"{total} file{'s' if total > 1 else ''} ({', '.join(named + more)})"


def _refuse_lost_links(paths: Iterable[str]) -> None:
    """Whatever their names: what such a link meant may have been a folder of documents."""
    for path in paths:
        if os.path.islink(path) and not os.path.exists(path):
            raise ConfigError(
                f"{path} is a link to a file that is not there. Remove or mend it, or name the other files."
            )


def _check_readable(files: list[str]) -> None:
    for path in files:
        if other := other_kind_of(path):
            raise ConfigError(
                f"{path} is {other}, as its name says. Unpack it, or write its documents as JSON lines; rename it if "
                "it holds some."
            )
        if not os.path.isfile(path):
            raise ConfigError(f"{path} is no ordinary file. Remove it, or name the other files.")
        packing = suffixes_of(path)[1]
        if packing and not os.path.getsize(path):
            raise ConfigError(
                f"{path} is damaged: it has no byte, and a {packing} file that holds nothing has some. Get the file "
                "again, or leave it out."
            )


def _refuse_twice(files: list[str]) -> None:
    """ConfigError for a file that is there twice, by the same path, a symbolic or a hard link."""
    seen: dict[object, str] = {}
    for path in files:
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino) if status.st_nlink > 1 else os.path.realpath(path)
        if first := seen.get(identity):
            is_same_path = os.path.abspath(path) == os.path.abspath(first)
            what = f"{path} more than once" if is_same_path else f"one file twice, by links: {first} and {path}"
            raise ConfigError(f"--input gives {what}. Its documents would count twice; give it once.")
        seen[identity] = path


def is_divisible(path: str) -> bool:
    """Whether lines can be found from any byte of the file on."""
    return not path.lower().endswith(PACKINGS) and kind_of(path) not in (".parquet", ".txt")


class Source:
    """The documents of one file that is not divisible, as JSON lines; iterate once.

    skip_lines: lines that are passed over. keys: which columns of a table are wanted; the first is a text's.
    filters: whose columns of a table are wanted too; a row that does not meet them has no others.
    ConfigError for what cannot be unpacked or read as a table. Lines are not parsed here.
    """

    def __init__(self, path: str, keys: list[str], skip_lines: int = 0, filters: Sequence[Filter] = ()):
        self.path, self._keys, self._skip_lines, self._filters = path, keys, skip_lines, filters
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
            yield from self._table_lines()
            return
        with open(self.path, "rb") as raw, damage_named(self.path):
            self._position = raw.tell
            file = unpacked(self.path, raw)
            if kind == ".txt":
                yield _as_json_line(self._read_document(file), self._keys[0])
            else:
                yield from lines_of(file)
            self._position = lambda: self.size  # the file is about to be closed

    def _read_document(self, file: IO[bytes]) -> bytes:
        longest = max(LONGEST_LINE, _TEXT_GROWS * self.size)
        text = file.read(longest + 1)
        if len(text) > longest:
            raise ConfigError(
                f"{self.path}, of {self.size} bytes, unpacks to a document of more than {longest}, which is no text. "
                "Leave it out, or unpack it first if it should be."
            )
        return text

    def _table_lines(self) -> Iterator[bytes]:
        for share, lines in row_lines(self.path, self._keys, self._filters):
            self._position = partial(int, self.size * share)
            yield from lines


def _as_json_line(text: bytes, key: str) -> bytes:
    """Without a byte order mark. What is not UTF-8 stays as it is: whoever parses the line names it, or skips it.

    So does what holds a zero byte: no text does, but UTF-16 without a mark, which would pass for UTF-8.
    """
    if b"\0" in text:
        return text
    try:
        return json.dumps({key: text.removeprefix(codecs.BOM_UTF8).decode("utf-8")}).encode()
    except UnicodeDecodeError:
        return text
