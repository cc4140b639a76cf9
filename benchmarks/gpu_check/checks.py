"""What a check is, what it may find, and when it does not apply."""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.gpu_check.settings import Settings

Figures = dict[str, Any]


class Bound(NamedTuple):
    """A figure, and what it may be at most."""

    value: float
    limit: float

    @property
    def is_kept(self) -> bool:
        return math.isfinite(self.value) and self.value <= self.limit


class Skip(Exception):
    """A check does not apply here. The message says why."""


@dataclass(frozen=True)
class Check:
    """run: gives the figures that were found, by name: numbers, texts, lists of texts, and `Bound`s, of which none may
    be broken. It raises what went wrong, or `Skip`."""

    name: str
    run: Callable[[], Figures]


#: In their order. What they need is set up by whoever yields them, and cleared away when he is closed, perhaps early.
Checks = Generator[Check, None, None]


def need_cuda(settings: Settings) -> None:
    """Skip on a CPU."""
    if not settings.is_cuda:
        raise Skip("needs CUDA")
