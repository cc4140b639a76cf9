"""`benchmark.py data`: text to tokens, ours against Megatron-LM's pattern.

Every contestant is a program of its own, started anew each time, so that wall time and memory are those of a user's
command: start-up, workers and the writing of the files included. Contestants take turns, and each ratio is formed
within one round: a machine that slows down slows all of them.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.corpus import Corpus, read_corpus, write_corpus
from benchmarks.measure import Measured, Spread, measure, table
from benchmarks.megatron_pattern import reference_tokens
from megatron_lrc.config import ConfigError
from megatron_lrc.data.indexed_files import read_index, read_indexed_file

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "Megatron-LM's pattern, 2 workers"
PACKAGES = ("tokenizers", "transformers", "megatron-core", "numpy")
COLUMNS = {
    "seconds": ("seconds", 1),
    "cpu_seconds": ("CPU s", 1),
    "text_mb_per_second": ("MB/s of text", 2),
    "tokens_per_second": ("tokens/s", 0),
    "peak_rss_mb": ("RSS, MB", 0),
    "peak_pss_mb": ("PSS, MB", 0),
    "ratio": ("ratio", 2),
}
OURS = {"megatron_lrc, 1 worker": 1, "megatron_lrc, 2 workers": 2}


@dataclass(kw_only=True)
class Contestant:
    """command: without --input, --tokenizer-model and --output-prefix. What follows is filled round by round."""

    name: str
    command: list[str]
    runs: list[Measured] = field(default_factory=list)
    sha256: dict[str, set[str]] = field(default_factory=lambda: {".bin": set(), ".idx": set()})
    tokens: int = 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer-model", required=True, metavar="DIR", help="Hugging Face tokenizer directory")
    parser.add_argument("--input", nargs="+", metavar="FILE", help='JSON lines with their text under "text"')
    parser.add_argument(
        "--corpus-mb",
        type=float,
        default=100,
        metavar="MB",
        help="without --input: text to take from the files of this Python environment (default: 100)",
    )
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="rounds (default: 2)")
    parser.add_argument(
        "--check-documents",
        type=int,
        default=0,
        metavar="N",
        help="compare the tokens of N random documents with transformers' tokenizer called on their text",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")


def run(arguments: argparse.Namespace, report: Callable[[str], None]) -> int:
    """Exit code: 1 if the contestants' .bin files, or the tokens of a checked document, differ."""
    if arguments.repeats < 1 or arguments.corpus_mb <= 0 or arguments.check_documents < 0:
        raise ConfigError("--repeats and --corpus-mb take numbers above 0, --check-documents takes 0 or more.")
    contestants = make_contestants()
    with tempfile.TemporaryDirectory() as folder:
        paths = arguments.input
        if not paths:
            paths = [os.path.join(folder, "corpus.jsonl")]
            write_corpus(Path(paths[0]), int(arguments.corpus_mb * 1e6))
        corpus = read_corpus(paths)
        report(f"corpus: {corpus.describe()}{'' if arguments.input else ', from the files of this Python environment'}")
        used = ", ".join(f"{name} {number}" for name, number in versions().items())
        report(f"{os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} before the start), {used}")
        for _ in range(arguments.repeats):
            for contestant in contestants:
                compete(contestant, corpus, arguments.tokenizer_model, folder)
                latest = contestant.runs[-1]
                report(f"  {contestant.name}: {latest.seconds:.1f} s, {latest.peak_rss / 1e6:,.0f} MB")
        checked = min(arguments.check_documents, corpus.num_texts)
        equal = count_equal(corpus, f"{folder}/o_text_document", arguments.tokenizer_model, checked)
    is_identical = {suffix: is_one(contestants, suffix) for suffix in (".bin", ".idx")}
    figures = {contestant.name: figures_of(contestant, contestants[0], corpus) for contestant in contestants}
    for line in summary(figures):
        report(line)
    for suffix, is_same in is_identical.items():
        report(f"{suffix} of all contestants: {'byte-identical' if is_same else 'DIFFERENT'} (SHA-256)")
    if checked:
        report(f"tokens equal to transformers' tokenizer: {equal} of {checked} random documents")
    if arguments.json:
        write_json(arguments.json, figures, is_identical, corpus, {"documents": checked, "equal": equal})
    return 0 if is_identical[".bin"] and equal == checked else 1


def make_contestants() -> list[Contestant]:
    pattern = ["-m", "benchmarks.megatron_pattern", "--workers", "2"]
    tool = [str(ROOT / "tools" / "preprocess_data.py"), "--append-eod", "--workers"]
    return [
        Contestant(name=BASELINE, command=pattern),
        *(Contestant(name=name, command=[*tool, str(workers)]) for name, workers in OURS.items()),
    ]


def compete(contestant: Contestant, corpus: Corpus, tokenizer_model: str, folder: str) -> None:
    """One run, in place of the output of the run before."""
    prefix = f"{folder}/o_text_document"
    for path in Path(folder).glob("o_text_document.*"):
        path.unlink()
    command = [sys.executable, *contestant.command, "--input", *corpus.paths]
    command += ["--tokenizer-model", tokenizer_model, "--output-prefix", f"{folder}/o"]
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    one_thread_each = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    contestant.runs.append(measure(command, {**os.environ, "PYTHONPATH": python_path, **one_thread_each}))
    contestant.tokens = read_indexed_file(prefix).num_tokens
    for suffix, digests in contestant.sha256.items():
        with open(f"{prefix}{suffix}", "rb") as file:
            digests.add(sha256_of(file))


def sha256_of(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := file.read(1 << 22):
        digest.update(piece)
    return digest.hexdigest()


def is_one(contestants: list[Contestant], suffix: str) -> bool:
    return len(set().union(*(contestant.sha256[suffix] for contestant in contestants))) == 1


def count_equal(corpus: Corpus, prefix: str, tokenizer_model: str, count: int) -> int:
    """How many of `count` random documents of our dataset hold what transformers' tokenizer gives for their text."""
    if not count:
        return 0
    index = read_index(prefix)
    if index.num_documents != corpus.num_texts:
        raise ConfigError(
            "--check-documents: some texts give no token, so documents and texts do not match one to one."
        )
    chosen = set(random.Random(0).sample(range(corpus.num_texts), count))
    texts = [text for number, text in enumerate(corpus.texts()) if number in chosen]
    expected = reference_tokens(tokenizer_model, texts)
    pairs = zip(sorted(chosen), expected, strict=True)
    return sum(index.document(number).tolist() == tokens for number, tokens in pairs)


def figures_of(contestant: Contestant, baseline: Contestant, corpus: Corpus) -> dict[str, Any]:
    """Spreads over the rounds; `ratio` is the baseline's time over the contestant's in the same round."""
    seconds = [run.seconds for run in contestant.runs]
    spreads = {
        "seconds": Spread.of(seconds),
        "text_mb_per_second": Spread.of([corpus.num_bytes / 1e6 / each for each in seconds]),
        "tokens_per_second": Spread.of([contestant.tokens / each for each in seconds]),
        "cpu_seconds": Spread.of([run.cpu_seconds for run in contestant.runs]),
        "peak_pss_mb": Spread.of([run.peak_pss / 1e6 for run in contestant.runs]),
        "peak_rss_mb": Spread.of([run.peak_rss / 1e6 for run in contestant.runs]),
        "ratio": Spread.of([other.seconds / each for other, each in zip(baseline.runs, seconds, strict=True)]),
    }
    return {name: asdict(spread) for name, spread in spreads.items()}


def summary(figures: dict[str, dict[str, Any]]) -> list[str]:
    rows = [["median (min-max)", *(title for title, _ in COLUMNS.values())]]
    for name, spreads in figures.items():
        rows.append([name, *(Spread(**spreads[column]).text(places) for column, (_, places) in COLUMNS.items())])
    return [
        "",
        *table(rows),
        "",
        "Times are of whole commands, start-up included. Memory is the peak of the sum over a command's processes: RSS",
        "counts a page that several of them share several times, PSS once. The ratio is the first line's time divided",
        "by the line's own, in the same round.",
    ]


def versions() -> dict[str, str]:
    return {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def write_json(
    path: str,
    figures: dict[str, dict[str, Any]],
    is_identical: dict[str, bool],
    corpus: Corpus,
    checked: dict[str, int],
) -> None:
    content = {
        "corpus": {
            "documents": len(corpus.sizes),
            "text_bytes": corpus.num_bytes,
            "distinct_bytes": corpus.distinct_bytes,
            "fresh_line_bytes": corpus.fresh_line_bytes,
        },
        "cores": os.cpu_count(),
        "versions": versions(),
        "contestants": figures,
        "byte_identical": {suffix.removeprefix("."): is_same for suffix, is_same in is_identical.items()},
        "checked": checked,
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
