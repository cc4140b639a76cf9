"""Which rows of the sources become documents: filters first, then a sample of what they leave.

A row is sampled by a hash of what it holds under the keys, and the seed. So the sample is the same on any machine, with
any number of workers, after a stop, and however the rows are divided into files, packed and ordered; a smaller fraction
is part of a larger one. Rows that are alike are sampled all or none.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from typing import Any

from megatron_lrc.data.filters import Filter


class Outcome(IntEnum):
    """What became of a line."""

    BLANK = 0
    KEPT = 1
    FILTERED = 2
    NOT_SAMPLED = 3
    BAD = 4


#: Outcome -> its name in the manifest. Blank lines are no rows, and bad ones are counted elsewhere.
ROW_COUNTS = {Outcome.KEPT: "kept", Outcome.FILTERED: "filtered", Outcome.NOT_SAMPLED: "not_sampled"}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Takes rows that meet all filters, and of them about the fraction, in (0, 1]."""

    filters: tuple[Filter, ...] = ()
    sample_fraction: float = 1.0
    sample_seed: int = 0

    @property
    def is_partial(self) -> bool:
        return bool(self.filters) or self.sample_fraction < 1.0

    def passes_filters(self, record: Mapping[str, Any]) -> bool:
        """ConfigError as of `Filter.holds`."""
        return not self.filters or all(condition.holds(record) for condition in self.filters)

    def is_sampled(self, values: list[Any]) -> bool:
        """values: what the row holds under each key."""
        if self.sample_fraction == 1.0:
            return True
        text = json.dumps(values, sort_keys=True).encode()
        digest = blake2b(text, digest_size=8, key=str(self.sample_seed).encode()).digest()
        return int.from_bytes(digest, "big") < self.sample_fraction * 2**64

    def as_manifest(self) -> dict[str, Any]:
        return {
            "filters": [condition.text for condition in self.filters],
            "sample_fraction": self.sample_fraction,
            "sample_seed": self.sample_seed,
        }
