"""What tools/fetch_tasks.py writes: a folder for --tasks-dir of tools/evaluate.py, and English text for --input.

TASKS_DIR/arc_easy/test.jsonl           rows, under the names of the splits that lm-evaluation-harness scores
TASKS_DIR/mmlu/anatomy/test.jsonl       one folder for each subject, with dev.jsonl for examples
TASKS_DIR/english_tune.jsonl            text to choose settings on; english_report.jsonl: text to report on
TASKS_DIR/manifest.json                 where all this comes from, which rows, their counts and hashes
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from megatron_lrc.config import ConfigError
from megatron_lrc.evaluation.english import lambada_text, passages, split_passages
from megatron_lrc.evaluation.task_package import NAME, TaskPackage, find_package
from megatron_lrc.json_files import read_json

MANIFEST = "manifest.json"
Rows = list[dict[str, Any]]
NOTES = (
    "Nothing here is to be trained on: rows are for scores, english_tune.jsonl is for choosing settings, and "
    "english_report.jsonl for the held-out losses that are reported.",
    "Of some data sets the package has the validation rows alone, where the harness scores the test split (arc_easy, "
    "arc_challenge, sciq, openbookqa). They stand here as test.jsonl, so scores are of other rows than published ones.",
)


@dataclass(frozen=True)
class Source:
    """Where a task's rows are. folder: below the package's hf_datasets. splits: the file's name -> the package's split;
    the first is the one that is scored."""

    folder: str
    splits: dict[str, str] = field(default_factory=lambda: {"validation": "validation"})
    convert: Callable[[int, dict[str, Any]], dict[str, Any]] = lambda number, row: row


def _boolq_row(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """As SuperGLUE has it, whose columns the harness's boolq names."""
    return {"question": row["question"], "passage": row["passage"], "idx": number, "label": int(row["answer"])}


_AS_TEST = {"test": "validation"}
#: Task of lm-evaluation-harness -> its rows.
SOURCES = {
    "arc_easy": Source("ai2_arc/ARC-Easy", _AS_TEST),
    "arc_challenge": Source("ai2_arc/ARC-Challenge", _AS_TEST),
    "piqa": Source("piqa/plain_text"),
    "sciq": Source("sciq/none", _AS_TEST),
    "winogrande": Source("winogrande/winogrande_xl"),
    "commonsense_qa": Source("tau/commonsense_qa/none"),
    "boolq": Source("boolq/none", convert=_boolq_row),
    "hellaswag": Source("hellaswag/none"),
    "openbookqa": Source("openbookqa/main", _AS_TEST),
    "social_iqa": Source("social_i_qa/none"),
    "copa": Source("super_glue/copa"),
}
MMLU = Source("hails/mmlu_no_train", {"test": "test", "dev": "dev", "validation": "validation"})


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """As the flags of tools/fetch_tasks.py, which describes them."""

    output: Path
    package: Path | None
    rows: int | None
    mmlu_rows: int | None
    seed: int


def fetch_tasks(options: FetchOptions, report: Callable[[str], None]) -> dict[str, Any]:
    """Write the folder, whole or not at all; what its manifest says. ConfigError where it exists."""
    package = find_package(options.package)
    with _whole_folder(options.output) as folder:
        files = dict(_write_tasks(package, options, folder))
        english = dict(_write_english(package, folder))
        manifest = {
            "package": NAME,
            "version": package.version,
            "rows": options.rows,
            "mmlu_rows": options.mmlu_rows,
            "seed": options.seed,
            "notes": NOTES,
            "tasks": _summary(files),
            "english": english,
            "files": files,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for task, found in manifest["tasks"].items():
        report(f"{task}: {found['rows']:,} of {found['of']:,} rows")
    for name, found in english.items():
        report(f"{name}: {found['documents']:,} documents, {found['bytes'] / 1e6:.2f} MB of text")
    return manifest


def read_source(tasks_dir: Path | None) -> dict[str, Any] | None:
    """What the manifest of such a folder says of its rows, to stand beside scores; None where it has none."""
    if tasks_dir is None or not (tasks_dir / MANIFEST).is_file():
        return None
    try:
        manifest = read_json(tasks_dir / MANIFEST)
        return {name: manifest[name] for name in ("package", "version", "seed", "tasks")}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{tasks_dir / MANIFEST} is damaged ({error}). Run fetch-tasks again.") from error


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into, which gets its name when the block ends well."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"--output {output} is already there. Remove it, or give another folder.")
    partial = output.with_name(f"{output.name}.{uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# ------------------------------------------------------------------------------------------------ tasks


def _write_tasks(package: TaskPackage, options: FetchOptions, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, what the manifest says of it) for each split that is written."""
    for task, source in SOURCES.items():
        yield from _write_splits(package, source, {task: source.folder}, folder, options.rows, options.seed)
    subjects = {f"mmlu/{subject}": f"{MMLU.folder}/{subject}" for subject in package.subsets(MMLU.folder)}
    mmlu_rows = options.rows if options.mmlu_rows is None else options.mmlu_rows
    yield from _write_splits(package, MMLU, subjects, folder, mmlu_rows, options.seed)
    texts = [{"text": lambada_text(line)} for line in package.requests("lambada/bpb_0shot")]
    kept = choose_rows({"lambada_openai": len(texts)}, options.rows, options.seed)["lambada_openai"]
    name = "lambada_openai/test.jsonl"
    yield name, _write_rows(folder / name, [texts[number] for number in kept], of=len(texts), split="test")


def _write_splits(
    package: TaskPackage, source: Source, places: dict[str, str], folder: Path, count: int | None, seed: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """places: folder to write -> the package's. count: rows to keep of the scored split of all of them together."""
    for position, (name, split) in enumerate(source.splits.items()):
        tables = {place: package.table(its_folder, split) for place, its_folder in places.items()}
        sizes = {place: len(rows) for place, rows in tables.items()}
        kept = choose_rows(sizes, None if position else count, seed)
        for place, rows in tables.items():
            chosen = [source.convert(number, rows[number]) for number in kept[place]]
            file = f"{place}/{name}.jsonl"
            yield file, _write_rows(folder / file, chosen, of=len(rows), split=split) | {"scored": not position}


def choose_rows(sizes: dict[str, int], count: int | None, seed: int) -> dict[str, list[int]]:
    """Numbers of the rows to keep of each part, rising: `count` of all parts together, of each in proportion to its
    size and at least one; all of them where `count` is None or no fewer.

    A row's place in the drawing is a hash of seed, part and number, so that it is alike on every machine, and fewer
    rows are a subset of more as far as each part's share does not shrink.
    """
    total = sum(sizes.values())
    if count is None or count >= total:
        return {part: list(range(size)) for part, size in sizes.items()}
    shares = _shares(sizes, count)
    return {part: sorted(_drawn(part, size, seed)[: shares[part]]) for part, size in sizes.items()}


def _shares(sizes: dict[str, int], count: int) -> dict[str, int]:
    """Whole numbers in proportion to the sizes, by largest remainders; their sum is `count`, or a one for each part."""
    total = sum(sizes.values())
    exact = {part: count * size / total for part, size in sizes.items()}
    shares = {part: max(1, int(value)) for part, value in exact.items()}
    by_remainder = sorted(exact, key=lambda part: shares[part] - exact[part])
    for part in by_remainder[: max(0, count - sum(shares.values()))]:
        shares[part] += 1
    return shares


def _drawn(part: str, size: int, seed: int) -> list[int]:
    return sorted(range(size), key=lambda number: hashlib.sha256(f"{seed} {part} {number}".encode()).digest())


def _write_rows(path: Path, rows: Iterable[dict[str, Any]], *, of: int, split: str) -> dict[str, Any]:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    return {"rows": len(lines), "of": of, "package_split": split, "sha256": _write_text(path, "".join(lines))}


def _write_text(path: Path, text: str) -> str:
    """The SHA-256 of what is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return hashlib.sha256(text.encode()).hexdigest()


def _summary(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each task the rows that are scored, as the manifest's short part has them."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in files.items():
        if entry.get("scored", True):
            task = name.partition("/")[0]
            counts = found.setdefault(task, {"rows": 0, "of": 0, "scored_as": Path(name).stem})
            counts["package_split"] = entry["package_split"]
            counts["rows"] += entry["rows"]
            counts["of"] += entry["of"]
    return found


# ------------------------------------------------------------------------------------------------ English text


def _write_english(package: TaskPackage, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, chosen in split_passages(passages(package)).items():
        lines = [json.dumps({"text": one.text, "source": one.source}, ensure_ascii=False) + "\n" for one in chosen]
        sources = [one.source for one in chosen]
        yield (
            name,
            {
                "documents": len(chosen),
                "bytes": sum(len(one.text.encode()) for one in chosen),
                "by_source": {source: sources.count(source) for source in sorted(set(sources))},
                "sha256": _write_text(folder / name, "".join(lines)),
            },
        )
