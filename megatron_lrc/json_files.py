"""JSON that somebody else may have written or damaged: whatever is wrong with it is a ValueError."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """What a file in UTF-8 holds. OSError where there is none; ValueError, with the reason, where it is not JSON.

    A byte order mark is refused, although it could be skipped: transformers and tokenizers, which read the same
    files, do not.
    """
    text = path.read_text(encoding="utf-8")
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a UTF-8 byte order mark; save it as UTF-8 without one")
    try:
        return json.loads(text)
    except RecursionError:  # the parser's answer to thousands of brackets
        raise ValueError("it is nested too deeply") from None
