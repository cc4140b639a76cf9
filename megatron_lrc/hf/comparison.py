"""Two models' logits of the same tokens, held against each other."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lrc.hf.forward import HuggingFaceModel, fixed_tokens

#: Largest difference of logits, over their standard deviation, between engines that compute the same weights in the
#: same dtype in another order. In float32, measured with random models: 2e-6 (2 layers), up to 5e-5 (40 layers with
#: attention that is nearly one-hot), while faults began at 3e-3 (one element of a bias) and 2e-2 (RoPE scaling of Llama
#: 3.1 forgotten, at its published settings). In float64: 2e-13.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}

#: A model that amplifies rounding further may differ by this many times what rounding makes of its own logits.
ROUNDING_FACTOR = 4.0


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


def find_difference(
    directory: Path, ours: Tensor, transformers: Tensor, weights_dtype: torch.dtype | None = None
) -> str | None:
    """Compare another engine's fp32 logits of `fixed_tokens` with those that transformers has of this directory, its
    weights rounded to `weights_dtype`. Prints the largest difference; gives it if it is more than rounding."""
    difference, tolerance = compare_logits(ours, transformers), TOLERANCES[torch.float32]
    print(f"logits: {difference}", flush=True)
    if difference.is_within(tolerance):
        return None
    tokens = fixed_tokens(transformers.shape[-1])
    exact = HuggingFaceModel(directory).logits(tokens, torch.float64, weights_dtype)
    rounding = compare_logits(exact, transformers.double()).largest
    if difference.largest <= ROUNDING_FACTOR * rounding:
        print(f"That is rounding: float32 moves transformers' own logits by {rounding:.1e}.", flush=True)
        return None
    return (
        f"{difference}; at most {tolerance:g} standard deviations, or {ROUNDING_FACTOR:g} times what float32 rounds "
        f"away ({rounding:.1e}), are expected"
    )
