"""Collects English text from what every Python environment already has, as JSONL: {"text", "source"}.

    python -m megatron_lrc.comparison.collect_text --output-dir demo/text       # writes train.jsonl and heldout.jsonl

The demo and `compare` train on it. Nothing is downloaded. Three kinds of source, one document each: the help topics
of pydoc; the docstrings of one module file of the standard library or of an installed package, read with `ast` and
never imported; the long description of one installed distribution. Only prose paragraphs stay: no code, tables or
lists of parameters.

The held-out part must measure what the student learned, not what it saw. It takes whole sources (chosen by a hash of
their names, so the same environment gives the same parts), every paragraph occurs once in both parts together, and a
held-out paragraph that shares many word sequences with the training part is dropped: packages copy from each other.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_lrc.shingles import is_repetition, shingles
from megatron_lrc.whole_files import write_whole

SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
SKIPPED_PATHS = ("transformers/models",)  # thousands of near copies of each other: slow to read, and dull
MIN_PARAGRAPH = 120  # characters
MIN_DOCUMENT = 400  # characters of prose per source
ARGUMENT_LIST = re.compile(
    r"^\s*(?:Args|Arguments|Parameters|Attributes|Returns|Yields|Raises)\s*(?::|\n\s*-{3,})", re.M
)

Document = tuple[str, list[str]]  # (source, paragraphs)


def python_files(root: Path) -> Iterator[Path]:
    """Every module below `root` in a fixed order, test suites and vendored copies left out."""
    for folder, subfolders, names in os.walk(root):
        inside = Path(folder).relative_to(root)
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in SKIPPED_FOLDERS and (inside / name).as_posix() not in SKIPPED_PATHS
        )
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(folder) / name


def docstrings(path: Path) -> list[str]:
    """The docstrings of a module, its classes and functions, in the order of the file; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return []  # templates and deliberately broken files; there is no shortage of others
    return [text for owner in docstring_owners(tree) if (text := ast.get_docstring(owner, clean=True))]


def docstring_owners(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """`node` and the definitions inside it. Only statement bodies: ast.walk visits every expression too."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    body = getattr(node, "body", None)
    for statement in body if isinstance(body, list) else []:
        yield from docstring_owners(statement)


def is_prose(paragraph: str) -> bool:
    """True of running English: long enough, nearly all letters, with sentences that begin and end."""
    if len(paragraph) < MIN_PARAGRAPH or paragraph.startswith((">>>", "..", "|", "+-", ":")):
        return False
    if re.match(r"[\w*, ]+ : ", paragraph):  # "name : type", one argument of a NumPy-style list
        return False
    letters = sum(character.isascii() and (character.isalpha() or character == " ") for character in paragraph)
    words = paragraph.split()
    lowercase_words = sum(word.strip(".,;:()'\"").islower() for word in words)
    has_sentence = re.search(r"[A-Z][^.]*[a-z)]\.(\s|$)", paragraph) is not None
    return letters >= 0.9 * len(paragraph) and lowercase_words >= 0.6 * len(words) and has_sentence


def prose_paragraphs(text: str) -> list[str]:
    """The prose paragraphs of a docstring or a Markdown page, each on one line with single spaces."""
    text = re.sub(r"```.*?(```|\Z)", "\n\n", text, flags=re.DOTALL)
    sections = (ARGUMENT_LIST.split(paragraph)[0] for paragraph in re.split(r"\n\s*\n", text))
    paragraphs = (" ".join(section.split()) for section in sections)
    return [paragraph for paragraph in paragraphs if is_prose(paragraph)]


def documents_from_files(root: Path, label: str) -> Iterator[Document]:
    """One document for each module file below `root`."""
    for path in python_files(root):
        source = f"{label}/{path.relative_to(root).as_posix()}"
        yield source, [paragraph for text in docstrings(path) for paragraph in prose_paragraphs(text)]


def documents_from_descriptions(distributions: Iterable[importlib.metadata.Distribution]) -> Iterator[Document]:
    """One document for each installed distribution but this project's: the README that its metadata carries.

    With ours among them, each change of our README would shift the documents, and so what calibration and training see.
    """
    for distribution in distributions:
        metadata: Any = distribution.metadata  # an email.message.Message, which its declared type does not say
        name, text = metadata["Name"], metadata.get("Description") or metadata.get_payload()
        if name and name.replace("_", "-") != "megatron-lrc" and isinstance(text, str):
            yield f"description/{name}", prose_paragraphs(inspect.cleandoc(text))


def documents_from_topics() -> Iterator[Document]:
    """One document for each help topic of the running Python (the language reference, as pydoc shows it)."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"topic/{name}", prose_paragraphs(text)


def split_sources(sources: Iterable[str], heldout_share: float) -> tuple[list[str], list[str]]:
    """(training, held-out) sources. A source's part depends on its name alone."""
    parts: tuple[list[str], list[str]] = ([], [])
    for source in sorted(set(sources)):
        digest = hashlib.sha256(source.encode()).digest()
        parts[int.from_bytes(digest[:8], "big") < heldout_share * 2**64].append(source)
    return parts


def drop_repeated(documents: list[Document], seen: set[str]) -> list[Document]:
    """Each paragraph once, over all documents and everything already in `seen` (which grows)."""
    unique = []
    for source, paragraphs in documents:
        fresh = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen]
        seen.update(fresh)
        unique.append((source, fresh))
    return long_enough(unique)


def long_enough(documents: list[Document]) -> list[Document]:
    return [document for document in documents if sum(map(len, document[1])) >= MIN_DOCUMENT]


def drop_overlapping(documents: list[Document], training: list[Document]) -> list[Document]:
    """Held-out documents without the paragraphs that largely occur in the training part under another wording."""
    trained = set().union(*(shingles(paragraph) for _, paragraphs in training for paragraph in paragraphs))

    def is_new(paragraph: str) -> bool:
        return not is_repetition(shingles(paragraph), trained)

    return long_enough([(source, list(filter(is_new, paragraphs))) for source, paragraphs in documents])


def split_documents(documents: Iterable[Document], heldout_share: float) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, sorted by source, without repetition within or between them."""
    by_source: dict[str, list[str]] = {}
    for source, paragraphs in documents:
        by_source.setdefault(source, []).extend(paragraphs)
    train_sources, heldout_sources = split_sources(by_source, heldout_share)
    seen: set[str] = set()
    heldout = drop_repeated([(source, by_source[source]) for source in heldout_sources], seen)
    train = drop_repeated([(source, by_source[source]) for source in train_sources], seen)
    return train, drop_overlapping(heldout, train)


def gather() -> Iterator[Document]:
    """Every document of this environment, with the counts of each kind printed as it goes."""
    paths = sysconfig.get_paths()
    roots = {"stdlib": Path(paths["stdlib"]), "packages": Path(paths["purelib"])}
    if paths["platlib"] != paths["purelib"]:
        roots["platform-packages"] = Path(paths["platlib"])
    kinds: dict[str, Iterable[Document]] = {"pydoc topics": documents_from_topics()}
    kinds |= {f"docstrings of {label}": documents_from_files(root, label) for label, root in roots.items()}
    kinds["package descriptions"] = documents_from_descriptions(importlib.metadata.distributions())
    for kind, documents in kinds.items():
        found = [(source, paragraphs) for source, paragraphs in documents if paragraphs]
        size = sum(len(paragraph) for _, paragraphs in found for paragraph in paragraphs)
        print(f"  {kind}: {len(found)} sources, {size / 1e6:.2f} MB of prose", flush=True)
        yield from found


def write_parts(
    documents: Iterable[Document],
    output_dir: Path,
    *,
    heldout_share: float,
    min_train_bytes: int,
    min_heldout_bytes: int,
) -> None:
    """Writes train.jsonl, then heldout.jsonl; neither if there is too little text for both."""
    train, heldout = split_documents(documents, heldout_share)
    for part, chosen, needed in (("training", train, min_train_bytes), ("held-out", heldout, min_heldout_bytes)):
        size = sum(len(paragraph) for _, paragraphs in chosen for paragraph in paragraphs)
        if size < needed:
            raise ValueError(
                f"This Python environment gave {size} bytes of {part} text; {needed} are needed. "
                "Install the demo's packages (make demo does) and run again."
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", train), ("heldout", heldout)):
        texts = [("\n\n".join(paragraphs), source) for source, paragraphs in chosen]
        size = sum(len(text.encode()) for text, _ in texts)
        lines = (json.dumps({"text": text, "source": source}) + "\n" for text, source in texts)
        write_whole(output_dir / f"{name}.jsonl", "".join(lines))
        print(f"{name}: {len(chosen)} documents, {size / 1e6:.2f} MB -> {output_dir / name}.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--heldout-share", type=float, default=0.06, help="share of the sources kept out of training")
    parser.add_argument("--min-train-bytes", type=int, default=2_000_000, help="least training text, in bytes")
    parser.add_argument("--min-heldout-bytes", type=int, default=60_000, help="least held-out text, in bytes")
    flags = vars(parser.parse_args())
    try:
        write_parts(gather(), **flags)
    except (ValueError, OSError) as error:
        print(f"collect_text.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
