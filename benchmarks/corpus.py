"""Text to measure data preparation with: the user's JSON lines, or what every Python environment has in files.

One document per file: sources with their docstrings, descriptions of distributions, licences, notes. The order is by a
hash of the path, the same in the same environment, so that the beginning is a mixture too. Files alike are taken once.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megatron_lrc.config import ConfigError

_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
_NAMES = ("METADATA", "LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS")
_FILE_BYTES = range(200, 400_000)  # longer ones are mostly tables


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """JSON lines with their text under "text". Sizes in bytes of UTF-8 text, JSON's quoting left out."""

    paths: list[str]
    sizes: list[int]  # of each document
    distinct_bytes: int  # equal documents counted once, and so are documents with the same lines in another order
    fresh_line_bytes: int  # in lines that did not occur before: files that are nearly alike count for their difference

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes)

    @property
    def num_texts(self) -> int:
        """Documents that are not empty."""
        return sum(size > 0 for size in self.sizes)

    def describe(self) -> str:
        distinct, fresh = (100 * part / self.num_bytes for part in (self.distinct_bytes, self.fresh_line_bytes))
        return (
            f"{self.num_bytes / 1e6:.1f} MB of text in {len(self.sizes):,} documents (median {median(self.sizes):,.0f} "
            f"bytes), {distinct:.1f}% in distinct documents, {fresh:.1f}% in lines that did not occur before"
        )

    def texts(self) -> Iterator[str]:
        """The texts that are not empty, in order."""
        return (text for path in self.paths for text in _read_texts(path) if text)


def read_corpus(paths: list[str]) -> Corpus:
    """Looks at JSON lines. ConfigError if a line is not an object with text under "text"."""
    sizes, distinct_bytes, fresh_line_bytes = [], 0, 0
    seen: set[bytes] = set()
    seen_lines: set[int] = set()
    for path in paths:
        for text in _read_texts(path):
            size = len(text.encode())
            lines = text.splitlines(keepends=True)
            fresh = {hash(line): line for line in lines if hash(line) not in seen_lines}
            fresh_line_bytes += sum(len(line.encode()) for line in fresh.values())
            seen_lines.update(fresh)
            digest = hashlib.sha256("\n".join(sorted(map(str.strip, lines))).encode()).digest()
            sizes.append(size)
            if digest not in seen:
                seen.add(digest)
                distinct_bytes += size
    if not distinct_bytes:
        raise ConfigError(f"--input {' '.join(paths)}: there is no text to measure with.")
    return Corpus(paths=paths, sizes=sizes, distinct_bytes=distinct_bytes, fresh_line_bytes=fresh_line_bytes)


def write_corpus(path: Path, num_bytes: int) -> None:
    """At least `num_bytes` of the environment's text.

    Where it has less, the documents come again, each beginning at another of its lines: the same words, but no document
    twice. `Corpus.describe` tells how much is distinct.
    """
    written = turn = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < num_bytes:
            before = written
            for text in _environment_texts():
                lines = text.split("\n")
                first = turn * 997 % len(lines)
                turned = "\n".join([*lines[first:], *lines[:first]])
                file.write(json.dumps({"text": turned}) + "\n")
                written += len(turned.encode())
                if written >= num_bytes:
                    return
            if written == before:
                raise ConfigError("This Python environment has no text files. Give --input JSON lines instead.")
            turn += 1


def _environment_texts() -> Iterator[str]:
    seen = set()
    for path in _environment_files():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def _environment_files() -> list[Path]:
    found = {}
    for root in dict.fromkeys(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")):
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder, name)
                wanted = path.suffix in _SUFFIXES or name.startswith(_NAMES)
                if wanted and path.is_file() and path.stat().st_size in _FILE_BYTES:
                    found[os.path.realpath(path)] = hashlib.sha256(os.path.relpath(path, root).encode()).digest()
    return [Path(path) for path in sorted(found, key=lambda path: (found[path], path))]


def _read_texts(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f'{path}:{number} is not a JSON object with text under "text". Give the benchmark plain JSON lines.'
                ) from None
            yield text
