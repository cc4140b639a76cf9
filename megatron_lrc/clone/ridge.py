"""--init ridge: each P in front of a matrix is fitted, so that the student reads there what the teacher reads.

A matrix behind a norm reads n_T in the teacher and n_S in the student, so W_S = W_T P gives the teacher's output where
n_T = P n_S, whatever W_T is: one fit serves all matrices behind a norm. With sums over tokens,

    P = argmin sum |n_T - P n_S|^2 + l |P - P_0|^2 = P_0 + (sum n_T n_S^T - P_0 sum n_S n_S^T) (sum n_S n_S^T + l I)^-1

P_0 is the closed form of the basis: where tokens say nothing P stays there, and at d = D, where it leaves no error, P
is P_0. From "Train What You Deploy" (arXiv 2609.02006): an SVD of activations, then a ridge regression in each layer.

n_S is what the student would read if its residual stream were the teacher's in the basis, norm(Q^T x). So the moments
need the teacher only, and all layers' are gathered in one pass. Of a student without some of the teacher's layers, x is
the stream without what those have added: its projections learn to read what is missing from what is there.

What reads the stream without a norm reads x, of which each token counts as if it had unit RMS: n_T = x / rms(x), n_S =
Q^T x / rms(x), and P_0 = Q.

Notation: D teacher hidden, d student hidden, n tokens.
"""

import torch
from torch import Tensor

from megatron_lrc.clone.initialization import behind_norm

#: l as a part of the mean square of a feature of n_S. Losses do not depend on it from 1e-4 to 1e-2 (SmolLM2-135M).
RIDGE = 1e-3


def rms_norm(stream: Tensor, epsilon: float) -> Tensor:
    """Without a gain. stream: [..., h], fp32 or better."""
    return stream * (stream.square().mean(-1, keepdim=True) + epsilon).rsqrt()


class ReadingMoments:
    """Sums over the tokens that this rank saw of n_T n_S^T [D, d] and, below it, n_S n_S^T [d, d]: fp64 [D + d, d].

    basis: Q [D, d], fp64. teacher_gain: [D], what the norm multiplies by; None where there is no norm. epsilons: the
    teacher's and the student's.
    """

    def __init__(self, basis: Tensor, teacher_gain: Tensor | None, epsilons: tuple[float, float]):
        self._basis, self._gain, self._epsilons = basis, teacher_gain, epsilons
        self.total = basis.new_zeros(sum(basis.shape), basis.shape[1], dtype=torch.float64)

    @torch.no_grad()
    def add(self, stream: Tensor, missing: Tensor | float = 0.0) -> None:
        """stream: what the teacher's norm is given, [..., D]. missing: what of it comes from parts of the teacher that
        the student has not, in the basis, [..., d]. Products in fp32 or better, sums of them in fp64."""
        tokens = stream.flatten(0, -2).to(torch.promote_types(stream.dtype, torch.float32))  # [n, D]
        teacher = rms_norm(tokens, self._epsilons[0])
        missing = missing.flatten(0, -2) if isinstance(missing, Tensor) else missing
        student = tokens @ self._basis.to(tokens.dtype) - missing  # [n, d]
        if self._gain is None:
            student = student * (tokens.square().mean(-1, keepdim=True) + self._epsilons[0]).rsqrt()
        else:
            teacher, student = teacher * self._gain.to(tokens.dtype), rms_norm(student, self._epsilons[1])
        self.total += torch.cat([teacher, student], dim=-1).t() @ student

    @torch.no_grad()
    def fit(self) -> Tensor:
        """P [D, d], fp64. `total` must have been summed over ranks."""
        teacher, student = self.total.split(self._basis.shape)
        prior = self._basis if self._gain is None else behind_norm(self._basis, self._gain)
        ridge = RIDGE * student.diagonal().mean()
        factor = torch.linalg.cholesky(student + ridge * torch.eye(len(student)).to(student))
        return prior + torch.cholesky_solve((teacher - prior @ student).t(), factor).t().contiguous()
