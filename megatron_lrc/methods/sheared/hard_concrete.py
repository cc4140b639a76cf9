"""The hard concrete distribution: what a mask of learnt pruning is drawn from.

Louizos et al., arXiv 1712.01312, equations 10 to 13, with their constants, which arXiv 2310.06694 uses too: a binary
concrete variable, stretched beyond [0, 1] and cut off there, so that exact zeros and ones have a probability. All
functions are elementwise; log_alpha any shape.
"""

import math

import torch
from torch import Tensor

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1


def sample(log_alpha: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(z in [0, 1], dz / d log_alpha), for numbers drawn uniformly from (0, 1)."""
    s = torch.sigmoid((uniform.log() - (-uniform).log1p() + log_alpha) / TEMPERATURE)
    stretched = s * (HIGH - LOW) + LOW
    slope = s * (1 - s) * ((HIGH - LOW) / TEMPERATURE)
    is_inside = (stretched > 0) & (stretched < 1)
    return stretched.clamp(0, 1), slope * is_inside


def probability_kept(log_alpha: Tensor) -> tuple[Tensor, Tensor]:
    """(P(z > 0), its derivative by log_alpha). Summed up it is the expected size of what a mask keeps."""
    probability = torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))
    return probability, probability * (1 - probability)


def likely(log_alpha: Tensor) -> Tensor:
    """The z in [0, 1] that stands for the distribution where nothing is drawn: in validation, and in the cut model."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0, 1)
