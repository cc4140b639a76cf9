"""How far the student's distribution is from the teacher's: value and gradient, split by vocabulary.

With p_T = softmax(z_T / tau), p_S = softmax(z_S / tau), r = ln(p_S / p_T) and tau^2 before each:

    forward     KL(p_T || p_S)                                          p_S - p_T
    reverse     KL(p_S || p_T)                                          p_S (r - D)
    jsd:BETA    BETA KL(p_T || m) + (1 - BETA) KL(p_S || m),            (1 - BETA) p_S (ln(p_S / m) - KL(p_S || m))
                m = BETA p_T + (1 - BETA) p_S (GKD, arXiv 2306.13649)

The right column is the derivative by z_S / tau, with D the divergence itself: of any of them it is p_S (f - E),
where f is the derivative by p_S and E the mean of f under p_S. So whatever is not the forward KL takes one more
pass, for E, and under tensor parallelism one more small reduction. All are written in r, which expm1 and log1p make
of the small gap between two nearly equal distributions without subtracting them.

Over the top k tokens of the teacher (`over_top_k`) each of the k is one outcome and all others together are one
more, so nothing is renormalised, and the value is at most that over all of the vocabulary.

Notation: n tokens, v this rank's part of the vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lrc.clone.fusion import fused_on_cuda
from megatron_lrc.clone.vocabulary_shard import VocabularyShard
from megatron_lrc.config import FORWARD, REVERSE

#: Of z_T / tau: exp of it is nothing beside 1; expm1 of (z_S - z_T) / tau, with z_S at most 0, stays finite.
_COLDEST = -80.0


@dataclass(frozen=True, slots=True)
class BothLogits:
    """Two models' logits of some tokens, on this rank, and what all ranks know of them.

    student, teacher [n, v]: fp32 or better; `divergence` overwrites the student's by its gradient. tops: the largest of
    the whole vocabulary, [n] each. warm_sum, excess_sum, gap_sum [n]: as `sums_of_both` gives them, summed over ranks.
    """

    student: Tensor
    teacher: Tensor
    student_top: Tensor
    teacher_top: Tensor
    warm_sum: Tensor
    excess_sum: Tensor
    gap_sum: Tensor
    temperature: float
    shard: VocabularyShard

    @property
    def logits(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student, self.teacher, self.student_top, self.teacher_top

    @property
    def normalizer(self) -> Tensor:
        """ln of the sum of exp(z_S / tau) over that of exp(z_T / tau), [n]."""
        return torch.log1p(self.excess_sum / self.warm_sum)

    def sum_over_ranks(self, *partial: Tensor) -> Tensor:
        return self.shard.reduce(torch.stack(partial), dist.ReduceOp.SUM)


@dataclass(frozen=True, slots=True)
class GradientScales:
    """By token, [n]: what exp(z_S) is multiplied by for the LM loss, which one pass makes too, and what the
    divergence's derivative by z_S / tau is."""

    lm: Tensor
    divergence: Tensor


def divergence(
    both: BothLogits, beta: float, top_k: int, scales: GradientScales | None
) -> tuple[Tensor, Tensor | None]:
    """([n] divergences without tau^2, [n] the teacher's probability within its top k: None without top_k). With scales,
    the student's logits become the gradient."""
    if top_k:
        return over_top_k(both, beta, top_k, scales)
    return forward_kl(both, scales) if beta == FORWARD else over_all(both, beta, scales), None


def forward_kl(both: BothLogits, scales: GradientScales | None) -> Tensor:
    """KL(p_T || p_S), [n], whose sums and gradient need no pass of their own."""
    if scales is not None:
        # softmax(z_S / tau) - softmax(z_T / tau), without subtracting the two.
        kl_scale = scales.divergence / (both.warm_sum + both.excess_sum)
        stacked = torch.stack([scales.lm, kl_scale, kl_scale * both.excess_sum / both.warm_sum])
        _forward_gradient(*both.logits, stacked, both.temperature)
    return both.normalizer + both.gap_sum / both.warm_sum


def over_all(both: BothLogits, beta: float, scales: GradientScales | None) -> Tensor:
    """The divergence over the whole vocabulary, [n]."""
    known = (torch.stack([both.warm_sum, both.normalizer]), both.temperature, beta)
    value, mean_slope = both.sum_over_ranks(*_divergence_sums(*both.logits, *known))
    if scales is not None:
        _divergence_gradient(*both.logits, *known, torch.stack([scales.lm, scales.divergence, mean_slope]))
    return value


def over_top_k(both: BothLogits, beta: float, top_k: int, scales: GradientScales | None) -> tuple[Tensor, Tensor]:
    """The divergence over the teacher's top_k tokens and all others as one, and the probability of the first, [n] each.

    top_k: below the vocabulary's size. A rank computes with those of the top k that are its own.
    """
    ids, is_kept = _own_of_top_k(both, top_k)
    places = [(logits, logits.gather(1, ids)) for logits in (both.student, both.teacher)]
    student, teacher = (found for _, found in places)
    tau, smallest = both.temperature, torch.finfo(both.student.dtype).tiny
    known = torch.stack([both.warm_sum, both.normalizer])

    kept, ratio = _shares(student, teacher, both.student_top, both.teacher_top, known, tau)
    kept = kept * is_kept
    value, slope = _terms(kept, ratio, beta)
    # The others' share is summed up and not 1 less that of the top k, which may be nearly all. What is -inf meanwhile
    # is not among them.
    for logits, found in places:
        logits.scatter_(1, ids, found.masked_fill(is_kept, -torch.inf))
    others = _sums_of_shares(*both.logits, known, tau)
    sums = both.sum_over_ranks(value.sum(1), slope.sum(1), *others)

    other = sums[2].clamp_min(smallest)
    other_ratio = torch.log1p(sums[3] / other).clamp(_COLDEST, -_COLDEST)
    other_value, other_slope = _terms(other, other_ratio, beta)
    mean_slope = sums[1] + other_slope
    if scales is None:
        for logits, found in places:
            logits.scatter_(1, ids, found)
    else:
        by_other = other_slope / (other * other_ratio.exp()).clamp_min(smallest) - mean_slope
        student_sum = both.warm_sum + both.excess_sum
        _scaled_shares(
            both.student, both.student_top, torch.stack([scales.lm, scales.divergence * by_other / student_sum]), tau
        )
        by_kept = slope - kept * ratio.exp() * mean_slope.unsqueeze(1)
        own = (student - both.student_top.unsqueeze(1)).exp() * scales.lm.unsqueeze(1)
        own += by_kept * scales.divergence.unsqueeze(1)
        both.student.scatter_(1, ids, torch.where(is_kept, own, both.student.gather(1, ids)))
    return sums[0] + other_value, 1 - other


def _own_of_top_k(both: BothLogits, top_k: int) -> tuple[Tensor, Tensor]:
    """(ids [n, k'], bool [n, k']): this rank's largest logits of the teacher, and whether they are among all ranks'."""
    num_own = min(top_k, both.teacher.shape[1])
    largest, ids = both.teacher.topk(num_own, dim=1)
    offered = largest.new_full((len(largest), top_k), -torch.inf)
    offered[:, :num_own] = largest
    offered = both.shard.gather(offered)
    chosen = torch.zeros_like(offered, dtype=torch.bool).scatter_(1, offered.topk(top_k, dim=1).indices, True)
    first = both.shard.rank * top_k
    return ids, chosen[:, first : first + num_own]


def _terms(teacher: Tensor, ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Of p_T and r: what each outcome adds to the divergence, and p_S times the derivative by p_S, up to a constant
    times p_S. The first has p_T - p_S added, which sums to 0 and makes errors of the normalizers not count."""
    excess = torch.expm1(ratio).mul_(teacher)  # p_S - p_T
    if beta == FORWARD:
        return excess - teacher * ratio, excess
    student = excess + teacher
    if beta == REVERSE:
        slope = student * ratio
        return slope - excess, slope
    mixed = torch.expm1(ratio).mul_(1 - beta).log1p_()  # ln(m / p_T)
    slope = student.mul_(ratio - mixed).mul_(1 - beta)
    return slope - beta * teacher * mixed, slope


def _shares(
    student: Tensor, teacher: Tensor, student_top: Tensor, teacher_top: Tensor, known: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """p_T and r of logits [n, k]. known: [2, n], the sum of exp(z_T / tau), and the normalizer of both."""
    warm_sum, normalizer = known.unsqueeze(2)
    cold = (teacher - teacher_top.unsqueeze(1)).mul_(1.0 / temperature).clamp_min_(_COLDEST)
    ratio = (student - student_top.unsqueeze(1)).mul_(1.0 / temperature).sub_(cold).sub_(normalizer)
    return cold.exp_().div_(warm_sum), ratio.clamp_max_(-_COLDEST)


# Each of these is one pass over both models' logits [n, v], less their largest [n]. Nothing is kept between them, so
# that no other matrix of this size exists.


@fused_on_cuda
def sums_of_both(
    student_logits: Tensor, teacher_logits: Tensor, student_top: Tensor, teacher_top: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """[n] each: sums of exp(z_S), exp(z_T), exp(z_T/tau), exp(z_S/tau) - exp(z_T/tau), and of
    (z_T - z_S)/tau * exp(z_T/tau)."""
    student, teacher = student_logits - student_top.unsqueeze(1), teacher_logits - teacher_top.unsqueeze(1)
    teacher_sum = teacher.exp().sum(1)
    warm, excess, gap = _warm_terms(student, teacher, temperature)
    return student.exp_().sum(1), teacher_sum, warm.sum(1), excess.sum(1), gap.mul_(warm).sum(1)


@fused_on_cuda
def _forward_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_top: Tensor,
    teacher_top: Tensor,
    scales: Tensor,
    temperature: float,
) -> None:
    """student_logits <- a exp(z_S) + b (exp(z_S/tau) - exp(z_T/tau)) - c exp(z_T/tau), a, b, c the scales.
    scales: [3, n]."""
    lm_scale, excess_scale, warm_scale = scales.unsqueeze(2)
    student = student_logits.sub_(student_top.unsqueeze(1))
    teacher = teacher_logits - teacher_top.unsqueeze(1)  # in place a GPU would write back what nobody reads
    warm, excess, _ = _warm_terms(student, teacher, temperature)
    student.exp_().mul_(lm_scale).addcmul_(excess, excess_scale).addcmul_(warm, warm_scale, value=-1.0)


@fused_on_cuda
def _divergence_sums(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_top: Tensor,
    teacher_top: Tensor,
    known: Tensor,
    temperature: float,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """[n] each: the divergence, and the mean of its slope under p_S."""
    teacher, ratio = _shares(student_logits, teacher_logits, student_top, teacher_top, known, temperature)
    value, slope = _terms(teacher, ratio, beta)
    return value.sum(1), slope.sum(1)


@fused_on_cuda
def _divergence_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_top: Tensor,
    teacher_top: Tensor,
    known: Tensor,
    temperature: float,
    beta: float,
    scales: Tensor,
) -> None:
    """student_logits <- a exp(z_S) + b (slope - p_S c), a, b, c the scales. scales: [3, n]."""
    lm_scale, scale, mean_slope = scales.unsqueeze(2)
    teacher, ratio = _shares(student_logits, teacher_logits, student_top, teacher_top, known, temperature)
    _, slope = _terms(teacher, ratio, beta)
    slope.sub_(ratio.exp_().mul_(teacher).mul_(mean_slope)).mul_(scale)
    student_logits.sub_(student_top.unsqueeze(1)).exp_().mul_(lm_scale).add_(slope)


@fused_on_cuda
def _sums_of_shares(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_top: Tensor,
    teacher_top: Tensor,
    known: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """[n] each: sums of p_T and of p_S - p_T."""
    teacher, ratio = _shares(student_logits, teacher_logits, student_top, teacher_top, known, temperature)
    return teacher.sum(1), ratio.expm1_().mul_(teacher).sum(1)


@fused_on_cuda
def _scaled_shares(student_logits: Tensor, student_top: Tensor, scales: Tensor, temperature: float) -> None:
    """student_logits <- a exp(z_S) + b exp(z_S / tau), a, b the scales. scales: [2, n]."""
    lm_scale, scale = scales.unsqueeze(2)
    student = student_logits.sub_(student_top.unsqueeze(1))
    warm = (student / temperature).exp_()
    student.exp_().mul_(lm_scale).addcmul_(warm, scale)


def _warm_terms(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """exp(z_T/tau), exp(z_S/tau) - exp(z_T/tau) and (z_T - z_S)/tau, each [n, v], of logits at most 0;
    overwrites the teacher's.

    At a high temperature the distributions nearly agree, and KL is a small difference of large numbers (at
    tau = 40, 1e-3 of logarithms near 10, then times tau^2). expm1 of the gap keeps its digits.
    """
    teacher.mul_(1.0 / temperature).clamp_min_(_COLDEST)
    gap = torch.sub(teacher, student, alpha=1.0 / temperature)
    warm = teacher.exp_()
    return warm, gap.neg().expm1_().mul_(warm), gap
