"""How the projections start: from a normal, or in closed form from one basis of the teacher's residual stream.

With a basis Q (D, d), orthonormal columns, g the teacher's norm gain in front of a matrix, and c = sqrt(D / d), which
keeps the student's RMS the teacher's:

    P = Q for embed, o, down;   P = c diag(g) Q for q, k, v (input norm), gate, up (post norm), lm_head (final norm)

and the student's gains are 1. At d = D this is the teacher exactly, up to the norm's epsilon, whatever Q is. Where Q
selects channels, diag(g) Q = Q diag(Q^T g), so the gains stay outside: every P is Q, the matrices are the teacher's
with some rows or columns left out, and the student's gains are c Q^T g, those of the channels that are left. Q is
random, or comes from the second moment of the residual stream over calibration tokens and all the places where it is
read, each token scaled to unit RMS: its leading eigenvectors (PCA), or the channels where it is largest (the
activation-ranked channel selection of "RED", arXiv 2605.29327).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_lrc.clone.projections import Projections
from megatron_lrc.clone.seeds import generator_of
from megatron_lrc.clone.sites import LM_HEAD


def norm_before(projection: str) -> str | None:
    """Name of the norm whose gain acts in front of the matrix that `projection` generates; None if there is none."""
    if projection == LM_HEAD.name:
        return "final"
    prefix, _, site = projection.rpartition(".")
    kind = {"q": "input", "k": "input", "v": "input", "gate": "post", "up": "post"}.get(site)
    return f"{prefix}.{kind}" if kind else None


@torch.no_grad()
def initialize_random(projections: Projections, *, std: float, seed: int) -> None:
    """Every P ~ N(0, std), gains 1. Each P is drawn whole, from a seed of its own name: any layout starts the same."""
    for name, _ in projections.named_matrices():
        size = (projections.teacher_size, projections.student_size)
        projections.set_matrix(name, std * torch.randn(size, generator=generator_of(seed, name), dtype=torch.float32))
    for _, gain in projections.named_norms():
        gain.fill_(1.0)


def random_basis(teacher_size: int, student_size: int, *, seed: int) -> Tensor:
    """Q [D, d], fp64: orthonormal columns that span a subspace drawn without preference; the same on any layout."""
    generator = generator_of(seed, "orthogonal")
    drawn = torch.randn(teacher_size, student_size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.contiguous()


@torch.no_grad()
def initialize_from_basis(projections: Projections, basis: Tensor, teacher_gains: Mapping[str, Tensor]) -> None:
    """The closed form. basis: Q [D, d], fp64, the same on every rank; teacher_gains: this stage's, by global name."""
    is_cut = selects_channels(basis)
    for name, _ in projections.named_matrices():
        norm = None if is_cut else norm_before(name)
        projections.set_matrix(name, basis if norm is None else behind_norm(basis, teacher_gains[norm]))
    for name, gain in projections.named_norms():
        gain.copy_(_scale(basis) * (basis.t() @ teacher_gains[name].to(basis)) if is_cut else torch.ones_like(gain))


def selects_channels(basis: Tensor) -> bool:
    """Whether the columns of Q [D, d], which are orthonormal, are columns of the identity."""
    return bool(((basis == 0) | (basis == 1)).all())


def behind_norm(basis: Tensor, teacher_gain: Tensor) -> Tensor:
    """c diag(g) Q [D, d], of a matrix that reads a norm's output. teacher_gain: g [D]."""
    return _scale(basis) * teacher_gain.to(basis).unsqueeze(1) * basis


def _scale(basis: Tensor) -> float:
    """c of Q [D, d]."""
    return math.sqrt(basis.shape[0] / basis.shape[1])


class SecondMoment:
    """Sum over tokens of x^T x, fp64 [D, D], each token x [D] scaled to unit RMS. Partial over whatever ranks see."""

    def __init__(self, size: int, device: torch.device):
        self.total = torch.zeros(size, size, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, stream: Tensor) -> None:
        """stream: [..., D]."""
        tokens = stream.flatten(0, -2).to(torch.promote_types(stream.dtype, torch.float32))
        unit = tokens * tokens.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
        self.total += unit.t() @ unit

    def leading_eigenvectors(self, count: int) -> Tensor:
        """Q [D, count], fp64, by falling eigenvalue. eigh works on the CPU: D is a few thousand, once per run."""
        _, vectors = torch.linalg.eigh(self.total.cpu())
        return vectors.flip(1)[:, :count].contiguous()

    def largest_channels(self, count: int) -> Tensor:
        """Q [D, count], fp64: columns of the identity, by falling mean square of the channel; equal ones in order."""
        order = self.total.diagonal().argsort(descending=True, stable=True)[:count]
        return torch.eye(len(self.total), dtype=self.total.dtype, device=self.total.device)[:, order].contiguous()
