"""How the projections start: from a normal, or in closed form from one basis of the teacher's residual stream.

With a basis Q (D, d), orthonormal columns, g the teacher's norm gain in front of a matrix, and c = sqrt(D / d), which
keeps the student's RMS the teacher's:

    P = Q for embed, o, down;   P = c diag(g) Q for q, k, v (input norm), gate, up (post norm), lm_head (final norm)

and the student's gains are 1. At d = D this is the teacher exactly, up to the norm's epsilon, whatever Q is. What reads
the stream without a norm has P = Q; where embeddings are multiplied by a factor of the hidden size, Q is multiplied by
the teacher's over the student's. Where Q
selects channels, diag(g) Q = Q diag(Q^T g), so the gains stay outside: every P is Q, the matrices are the teacher's
with some rows or columns left out, and the student's gains are c Q^T g, those of the channels that are left. Q is
random, or comes from the second moment of the residual stream over calibration tokens and all the places where it is
read, each token scaled to unit RMS: its leading eigenvectors (PCA), or the channels where it is largest (the
activation-ranked channel selection of "RED", arXiv 2605.29327).

A norm of what o or down gives, y, adds diag(g) y / rms(y) to the stream. The student's part of it is Q^T diag(g) y /
rms(y): with P = diag(g) Q / rms(g) its matrix gives z = P^T y, and rms(g) z / rms(y) is wanted where its norm, with a
gain of one number s, makes s z / rms(z). They differ by rms(z) / rms(y), which no gain can follow from token to token;
s is rms(g) times its mean over calibration tokens (`OutputRatios`), the best there is in the mean square of 1 / rms(z)
weighted by z. With channels P = Q, and the gains are Q^T g times that mean. So at d = D channels are the teacher
exactly, and other bases are only where g is one number.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_lrc.clone.projections import Projections
from megatron_lrc.clone.seeds import generator_of
from megatron_lrc.clone.sites import EMBED, LM_HEAD, WRITER_BEFORE


def norm_before(projection: str) -> str | None:
    """Name of the norm whose gain acts in front of the matrix that `projection` generates; None if there is none."""
    if projection == LM_HEAD.name:
        return "final"
    prefix, _, site = projection.rpartition(".")
    kind = {"q": "input", "k": "input", "v": "input", "gate": "post", "up": "post"}.get(site)
    return f"{prefix}.{kind}" if kind else None


def norm_behind(projection: str) -> str | None:
    """The same of the norm of what that matrix gives."""
    prefix, _, site = projection.rpartition(".")
    kind = {writer: norm for norm, writer in WRITER_BEFORE.items()}.get(site)
    return f"{prefix}.{kind}" if kind else None


@torch.no_grad()
def initialize_random(projections: Projections, *, std: float, seed: int) -> None:
    """Every P ~ N(0, std), gains 1. Each P is drawn whole, from a seed of its own name: any layout starts the same."""
    for name, _ in projections.named_matrices():
        size = (projections.teacher_size, projections.student_size)
        projections.set_matrix(name, std * torch.randn(size, generator=generator_of(seed, name), dtype=torch.float32))
    for name, _ in projections.named_norms():
        projections.set_gain(name, 1.0)


def random_basis(teacher_size: int, student_size: int, *, seed: int) -> Tensor:
    """Q [D, d], fp64: orthonormal columns that span a subspace drawn without preference; the same on any layout."""
    generator = generator_of(seed, "orthogonal")
    drawn = torch.randn(teacher_size, student_size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.contiguous()


@torch.no_grad()
def initialize_from_basis(
    projections: Projections, basis: Tensor, teacher_gains: Mapping[str, Tensor], *, embedding_ratio: float = 1.0
) -> None:
    """The closed form, but for `OutputRatios`. basis: Q [D, d], fp64, the same on every rank. teacher_gains: what this
    stage's norms multiply by, by global name. embedding_ratio: the teacher's factor of embeddings over the student's.
    """
    is_cut = selects_channels(basis)
    for name, _ in projections.named_matrices():
        before, after = (teacher_gains.get(norm_of(name) or "") for norm_of in (norm_before, norm_behind))
        if name == EMBED.name:
            matrix = embedding_ratio * basis
        elif before is not None and not is_cut:
            matrix = behind_norm(basis, before)
        elif after is not None and not is_cut:
            matrix = _before_norm(basis, after)
        else:
            matrix = basis
        projections.set_matrix(name, matrix)
    for name, _ in projections.named_norms():
        gain = teacher_gains[name].to(basis)
        is_after = name.rpartition(".")[2] in WRITER_BEFORE
        if is_cut:
            projections.set_gain(name, (1.0 if is_after else _scale(basis)) * (basis.t() @ gain))
        else:
            projections.set_gain(name, _rms(gain) if is_after else 1.0)


def selects_channels(basis: Tensor) -> bool:
    """Whether the columns of Q [D, d], which are orthonormal, are columns of the identity."""
    return bool(((basis == 0) | (basis == 1)).all())


def behind_norm(basis: Tensor, teacher_gain: Tensor) -> Tensor:
    """c diag(g) Q [D, d], of a matrix that reads a norm's output. teacher_gain: g [D]."""
    return _scale(basis) * teacher_gain.to(basis).unsqueeze(1) * basis


def _before_norm(basis: Tensor, teacher_gain: Tensor) -> Tensor:
    """diag(g) Q / rms(g) [D, d], of a matrix whose output is normed. teacher_gain: g [D]."""
    gain = teacher_gain.to(basis)
    return gain.unsqueeze(1) * basis / _rms(gain)


def _rms(gain: Tensor) -> Tensor:
    return gain.square().mean().sqrt()


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


class OutputRatios:
    """Sums over the tokens that this rank saw of rms(P^T y) / rms(y), and how many: fp64 [2]. y: what o or down gives
    before its norm. projection: its P [D, d]. epsilons: of the teacher's norm and the student's."""

    def __init__(self, projection: Tensor, epsilons: tuple[float, float]):
        self._projection, self._epsilons = projection, epsilons
        self.total = torch.zeros(2, dtype=torch.float64, device=projection.device)

    @torch.no_grad()
    def add(self, output: Tensor) -> None:
        """output: [..., D]."""
        wide = output.flatten(0, -2).to(torch.promote_types(output.dtype, torch.float32))
        teacher, student = (
            of.square().mean(-1) + epsilon
            for of, epsilon in zip((wide, wide @ self._projection.to(wide)), self._epsilons, strict=True)
        )
        self.total += torch.stack([(student / teacher).sqrt().sum(), torch.ones_like(teacher).sum()])
