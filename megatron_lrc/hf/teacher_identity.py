"""Whether a teacher is the one that a checkpoint was trained with, and what is said where that is not certain."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lrc.hf.content_hash import PREFIX, hash_files
from megatron_lrc.hf.reader import Contents, Reader
from megatron_lrc.hf.sampled_hash import is_sampled

_PATIENCE_SECONDS = 3.0
_SHOWN = 4  # tensors in one warning


def read_everything(reader: Reader) -> Contents:
    """What the files hold now, read by this process; nothing remembered is trusted. Says so if it takes a while."""
    with said_if_slow(f"reading every byte of {reader.description.given}, to see that it is the teacher it was"):
        return hash_files(reader.files)


@contextmanager
def said_if_slow(line: str, *, is_on: bool = True) -> Iterator[None]:
    """Print the line to stderr if the block has not ended after some seconds."""
    timer = threading.Timer(_PATIENCE_SECONDS, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    if is_on:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_same_teacher(fingerprint: str, reader: Reader, trained_with: str) -> bool:
    """Whether `reader`, whose fingerprint that is, reads what a checkpoint's `teacher_fingerprint` names.

    One that an earlier version noted is compared as that version would have.
    """
    return fingerprint == trained_with or (is_sampled(trained_with) and reader.sampled_fingerprint() == trained_with)


def short(fingerprint: str) -> str:
    """Its first digits, for messages."""
    return fingerprint.removeprefix(PREFIX)[:16]


def warn_of_samples(fingerprint: str, trained_with: str | None, checkpoint: Path | None, reader: Reader) -> list[str]:
    """One line where not every byte was compared. trained_with: by the checkpoint, if there is one."""
    given = reader.description.given
    if is_sampled(fingerprint):
        return [
            f"{given} was converted by an earlier version, which noted samples of the files only: a byte that changed "
            "between them is not seen. Convert the Hugging Face directory again"
        ]
    if trained_with and is_sampled(trained_with):
        return [
            f"{checkpoint} was written by an earlier version, which noted samples of the teacher's files only: a byte "
            f"of {given} that changed between them is not seen. The next checkpoint notes every byte"
        ]
    return []


def warn_of_suspicious(reader: Reader, contents: Contents) -> list[str]:
    """One line that names tensors which no trained model has."""
    found = reader.suspicious(contents)
    if not found:
        return []
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [
        f"{reader.description.given}: {', '.join(found[:_SHOWN])}{more}. An interrupted download looks like this, and "
        "so does a model that was never trained. Compare the files with their source"
    ]


def why_not_comparable(fingerprint: str, trained_with: str) -> str:
    """The end of a refusal: how the same teacher may look like another one."""
    if is_sampled(fingerprint) and not is_sampled(trained_with):
        return " If it is one that an earlier version has converted, convert it again: its record is too short to tell."
    return ""
