"""How evenly a matrix uses its directions.

    erank(X) = exp(H(p)),   p = s / sum(s),   s the singular values of X [n, h],   H the entropy in nats

Source: Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. It lies between 1
and min(n, h). Singular values come from the eigenvalues of X^T X [h, h], which may be a sum over ranks.
"""

import math

import torch
from torch import Tensor


def singular_values(second_moment: Tensor) -> Tensor:
    """Of X, ascending [h], from X^T X [h, h], in its dtype: fp64, since its rounding error is under a square root."""
    return torch.linalg.eigvalsh(second_moment).clamp_min(0).sqrt()


def effective_rank(second_moment: Tensor) -> Tensor:
    """erank(X) from X^T X [h, h]; not-a-number where that is not finite."""
    if not second_moment.isfinite().all():
        return second_moment.new_full((), torch.nan)  # eigvalsh would raise
    values = singular_values(second_moment)
    return torch.special.entr(values / values.sum()).sum().exp()


def condition_number(second_moment: Tensor) -> float:
    """Largest over smallest singular value of X, from X^T X [h, h], which is finite; infinite if X is singular."""
    values = singular_values(second_moment)
    return float(values[-1] / values[0]) if values[0] > 0 else math.inf
