"""What is said where training makes a student worse than it began: of validations, so of the same tokens each time.

The first validation of a run is what its later ones are held against, also where it has been continued: what was
validated before is read again from validation.jsonl.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_lrc.config import Config

#: Nothing is said of less than this share: printed, both values would look alike.
SHOWN = 1e-3
#: The clone loss may rise while the student gets better, and does so at most starts.
CLONE_FACTOR = 1.5


@dataclass(slots=True)
class _Watched:
    """A loss that is to stay below `factor` times its first value. That it does not is said once, and again only after
    it has been back at its first value or below."""

    key: str
    factor: float
    first: float | None = None
    is_above: bool = False

    def rises(self, record: dict[str, Any]) -> bool:
        """Take note of a validation; whether it is the first one, or the first after others below, that is above."""
        value = record.get(self.key)
        if value is None or not math.isfinite(value):
            return False
        first = self.first = value if self.first is None else self.first
        was_above = self.is_above
        self.is_above = value > self.factor * first or (was_above and value > first)
        return self.is_above and not was_above


class Rises:
    """Watches a run's validations. config: resolved; the advice names its settings. before: earlier validations."""

    def __init__(self, config: Config, before: Iterable[dict[str, Any]] = ()):
        self._config = config
        self._kl, self._lm = _Watched("teacher_kl", 1 + SHOWN), _Watched("lm_loss", 1 + SHOWN)
        self._clone = _Watched("clone_loss", CLONE_FACTOR)
        for record in before:
            self.look_at(record)

    def look_at(self, record: dict[str, Any]) -> str | None:
        """What to say of a validation, in its order; None if there is nothing."""
        return " ".join(self._sentences(record)) or None

    def _sentences(self, record: dict[str, Any]) -> Iterator[str]:
        by_kl = record.get("teacher_kl") is not None
        lm_rises = self._lm.rises(record)
        if self._kl.rises(record) or (lm_rises and not by_kl):
            watched, what = (self._kl, "KL from the teacher") if by_kl else (self._lm, "LM loss")
            yield (
                f"at step {record['step']} the {what} on the validation data is {record[watched.key]:.4g}, above the "
                f"{watched.first:.4g} of the first validation: the training makes this student worse. "
                f"{self._advice(record)}"
            )
        if self._clone.rises(record) and not self._lm.is_above:
            yield (
                f"at step {record['step']} the clone loss on the validation data is {record['clone_loss']:.4g}, "
                f"{CLONE_FACTOR:g} times the {self._clone.first:.4g} of the first validation and more, while the LM "
                "loss is not above its first: the losses pull against each other. Lower --alpha."
            )

    def _advice(self, record: dict[str, Any]) -> str:
        """What usually ends such a rise."""
        config, alpha = self._config, self._config.loss.alpha
        lower_alpha = f", or lower --alpha (now {alpha:g})" if alpha and record.get("clone_loss") is not None else ""
        return (
            f"Lower --lr (now {config.peak_lr:g}), or use a longer --lr-warmup-iters (now "
            f"{config.warmup_iters}){lower_alpha}."
        )
