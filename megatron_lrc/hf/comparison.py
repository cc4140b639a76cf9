"""Two models' logits of the same tokens, held against each other."""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Largest difference of logits, over their standard deviation, that rounding may make: both sides compute the same
#: weights in the same dtype, only in another order.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two models' logits: largest and mean absolute difference, the first one's standard deviation, and the part of
    the tokens after which both think the same next token likeliest."""

    largest: float
    mean: float
    deviation: float
    top1_agreement: float

    def is_within(self, tolerance: float) -> bool:
        """Whether the largest difference is at most `tolerance` standard deviations. Never for logits with NaN."""
        return self.largest <= tolerance * self.deviation

    def __str__(self) -> str:
        return f"largest difference {self.largest:.1e} (of logits with standard deviation {self.deviation:.3g})"


def compare_logits(first: Tensor, second: Tensor) -> Difference:
    """Both [b, s, v]."""
    assert first.shape == second.shape
    differences = (first - second).abs_()
    same = first.argmax(-1) == second.argmax(-1)
    return Difference(
        largest=differences.max().item(),
        mean=differences.mean().item(),
        deviation=first.std().item(),
        top1_agreement=same.double().mean().item(),
    )
