"""Counts in a config.json that transformers follows, item by item, as it reads the file.

Its configurations make a list of the layers' kinds and a table of labels: of 10^9 layers that takes minutes and tens
of gigabytes. So counts are looked at in the file itself, before any of transformers' loaders has it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lrc.config import ConfigError
from megatron_lrc.json_files import read_json

MOST = 10_000  # no model has as many layers, no classifier that anybody trains on as many labels
_COUNTED = ("layer", "label")


def check_counts(directory: Path | str) -> None:
    """ConfigError where config.json counts what no model has so many of. Others say what else is wrong."""
    file = Path(directory) / "config.json"
    try:
        values = read_json(file)
    except (OSError, ValueError):
        return
    for name, count in _counts(values):
        if count > MOST:
            raise ConfigError(
                f"{file} has {name} {str(count)[:40]}, and {MOST:,} at most are taken for those of a model. "
                "Correct it, or download it again."
            )


def _counts(values: Any) -> Iterator[tuple[str, int | float]]:
    """Name and number, also of a part's own configuration, such as text_config."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, (int, float)) and any(word in name for word in _COUNTED):
            yield name, value
        yield from _counts(value)
