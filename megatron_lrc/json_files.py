"""The one door for JSON that somebody else may have written or damaged: whatever is wrong with it is a ValueError."""

import json
from pathlib import Path
from typing import Any

from megatron_lrc.config import ConfigError
from megatron_lrc.os_errors import explain

#: Far beyond what any of the formats here has: tokenizers nest to a dozen, their files are some 40 MB.
DEEPEST, LARGEST_BYTES, LONGEST_NUMBER = 100, 1 << 28, 300


class Unreadable(ConfigError):
    """The system does not let a file be read, which says nothing of what is in it."""


def read_json(path: Path) -> Any:
    """What a file in UTF-8 holds. FileNotFoundError where there is none; ValueError, with the reason to complete a
    sentence, where it is not JSON that is worth following (`parse_json`); `Unreadable`, which is one too, where the
    system refuses it.

    A byte order mark is refused, although it could be skipped: transformers and tokenizers, which read the same
    files, do not.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for a writer
            raise ValueError("it is a folder" if path.is_dir() else "it is no regular file")
        if (size := path.stat().st_size) > LARGEST_BYTES:
            raise ValueError(f"it has {size / 1e6:.0f} MB, and no such file has more than {LARGEST_BYTES / 1e6:.0f}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(explain(error, str(path))) from error
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a UTF-8 byte order mark; save it as UTF-8 without one")
    return parse_json(text)


def read_object(path: Path) -> dict[str, Any]:
    """As `read_json`, of a file that is to hold one object."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    return values


def parse_json(text: str | bytes) -> Any:
    """The values of a text. ValueError where it is not JSON, where it nests so deeply that code which follows it would
    exhaust the stack, or where a number has so many digits that it is no float."""
    try:
        values = json.loads(text, parse_int=_parse_int)
    except RecursionError:  # the parser's answer to thousands of brackets
        raise ValueError("it is nested too deeply") from None
    if _is_deeper(values, DEEPEST):
        raise ValueError("it is nested too deeply")
    return values


def _parse_int(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(limit):
        inner = ((one.values() if isinstance(one, dict) else one) for one in level)
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True
