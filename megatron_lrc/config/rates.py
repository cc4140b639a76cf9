"""`--lr auto`: one rule for the peak learning rate of a Low-Rank Clone, by how it starts and by the tokens of a step.

`KNOWN_RATES` is all that the rule knows. Between two rows of a start the rate follows a power of the batch; below the
first row it falls with the square root of the batch, which keeps the noise that Adam adds to the weights per token
about alike (arXiv 2405.14578 finds the same for small batches); above the last row it stays, for want of evidence.
"""

import math
from dataclasses import dataclass
from typing import Literal

from .settings import OptimizerConfig, ProjectionConfig

Start = Literal["random", "closed form", "opened"]
Origin = Literal["measured", "published", "extrapolated"]


@dataclass(frozen=True, slots=True)
class KnownRate:
    """A peak learning rate that is known, or assumed, to be good for steps of so many tokens."""

    batch_tokens: int
    lr: float
    origin: Origin

    def __str__(self) -> str:
        return f"{self.lr:g} at {self.batch_tokens:,} tokens ({self.origin})"


#: By start, the smaller batches first. measured: on SmolLM2-135M (hidden size 576 -> 384) with this package
#: (docs/recipes.md), so for small students; published: of the paper's runs, 1e-4 for LRC-1.5B at 24 x 2,048 tokens (at
#: 16 x 2,048 it has 6.7e-5 for LRC-1.7B and 1e-4 for LRC-4B); extrapolated: of a closed form the published rate, which
#: the square root of the batch nearly leads to, and of an opened student twice the rate at four times the batch.
KNOWN_RATES: dict[Start, tuple[KnownRate, ...]] = {
    "random": (KnownRate(49_152, 1e-4, "published"),),
    "closed form": (KnownRate(1_024, 2e-5, "measured"), KnownRate(49_152, 1e-4, "extrapolated")),
    "opened": (KnownRate(1_024, 1.5e-4, "measured"), KnownRate(4_096, 3e-4, "extrapolated")),
}


def start_of(projection: ProjectionConfig) -> Start:
    """How the student starts, as far as the rate depends on it."""
    if projection.open_after == 0:
        return "opened"
    return "closed form" if projection.is_closed_form else "random"


def recommended_lr(start: Start, batch_tokens: int) -> float:
    """Peak learning rate for steps of so many tokens, of two digits."""
    below, above = _neighbours(start, batch_tokens)
    if below is None:
        rate = above.lr * math.sqrt(batch_tokens / above.batch_tokens)
    elif below is above:
        rate = below.lr
    else:
        power = math.log(above.lr / below.lr) / math.log(above.batch_tokens / below.batch_tokens)
        rate = below.lr * (batch_tokens / below.batch_tokens) ** power
    return float(f"{rate:.2g}")


def describe_rate(start: Start, batch_tokens: int) -> str:
    """The rate with its reason, as part of a sentence."""
    below, above = _neighbours(start, batch_tokens)
    if below is None:
        why = f"below {above} it falls with the square root of the batch"
    elif below is above:
        why = str(above) if batch_tokens == above.batch_tokens else f"no larger batch is known than {above}"
    else:
        why = f"between {below} and {above}"
    article = "an" if start == "opened" else "a"
    name = "opened student" if start == "opened" else f"{start.replace(' ', '-')} start"
    return f"{recommended_lr(start, batch_tokens):g} for {article} {name} and steps of {batch_tokens:,} tokens: {why}"


def _neighbours(start: Start, batch_tokens: int) -> tuple[KnownRate | None, KnownRate]:
    """The rows round a batch; the same one twice at a row and beyond the last, (None, first) before the first."""
    rows = KNOWN_RATES[start]
    below = next((row for row in reversed(rows) if row.batch_tokens <= batch_tokens), None)
    if below is None:
        return None, rows[0]
    if below.batch_tokens == batch_tokens:
        return below, below
    above = next((row for row in rows if row.batch_tokens > batch_tokens), below)
    return below, above


def choose_rates(projection: ProjectionConfig, optimizer: OptimizerConfig, batch_tokens: int) -> None:
    """Replace `--lr auto` by its number; of a run with an opening and no --open-lr the rate after it too."""
    if optimizer.lr is not None:
        return
    optimizer.lr = recommended_lr(start_of(projection), batch_tokens)
    if projection.open_after and projection.open_lr is None:
        projection.open_lr = recommended_lr("opened", batch_tokens)
