"""What a field of a section carries beside its default: the help of its flag, and the range of its values."""

from dataclasses import field
from typing import Any


def setting(default: Any, text: str, **extra: Any) -> Any:
    """A dataclass field with its help text. `extra` goes into the metadata: `required`, `metavar`, and the range
    of a number (`at_least`, `above`, `below`). `takes_suffix`: may be written as 10B. `per_rank` marks what ranks may
    have each its own: "path", where what lies there counts instead, or "value", which no other rank notices.
    `is_auto_if_none`: None is written `auto`."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **extra})
    return field(default=default, metadata={"help": text, **extra})
