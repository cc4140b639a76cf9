"""LM and KL loss from both models' final hidden states and LM heads, split by vocabulary, a chunk of tokens at a time.

    L_LM = -log softmax(z_S)[label]         L_KL = tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau))

Logits z = hidden @ head^T exist for one chunk only, and gradients are taken in the same pass, so memory does not grow
with tokens x vocabulary. What follows the GEMM is fp32 also for bf16 models: at tau = 40 a bf16 log-softmax turns the
KL's gradient by 45 to 65 degrees. Under tensor parallelism each rank has a slice of the vocabulary; per token two small
reductions (the largest logits, then five sums) give the exact loss, and the gradients stay local. dhidden is then a
partial sum over ranks, which the backward of the sequence-parallel gather sums.

Rejected: gathering logits. It costs the full matrix, and its gradient comes out tensor-parallel-size times too large.

Notation: n tokens, d and D hidden sizes, v this rank's part of the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """This rank's rows of a vocabulary padded to equal shards. Padding never counts: it is not among the rows used."""

    start: int
    num_valid: int
    group: ProcessGroup | None

    @classmethod
    def of(cls, vocab_size: int, padded_size: int, group: ProcessGroup | None) -> "VocabularyShard":
        """vocab_size: rows that mean tokens; padded_size: rows in all, a multiple of the group's size."""
        size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        start = rank * (padded_size // size)
        return cls(start, min(max(vocab_size - start, 0), padded_size // size), group if size > 1 else None)

    def reduce(self, partial: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is not None:
            dist.all_reduce(partial, op, group=self.group)
        return partial


def lm_and_kl_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    token_weight: Tensor,
    *,
    shard: VocabularyShard,
    lm_weight: float,
    kl_weight: float,
    temperature: float,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lm_weight * L_LM + kl_weight * L_KL, L_LM, L_KL), summed over weighted tokens; the first has a gradient.

    student_hidden [n, d], teacher_hidden [n, D]: all tokens on every rank. Heads [v, d], [v, D]: this rank's rows.
    labels [n]: global vocabulary ids. The three sums are complete on every rank, in fp32 (fp64 for fp64 input).
    """
    return _LmAndKl.apply(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        labels,
        token_weight,
        shard,
        (lm_weight, kl_weight, temperature, chunk_tokens),
    )


class _LmAndKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        labels: Tensor,
        token_weight: Tensor,
        shard: VocabularyShard,
        settings: tuple[float, float, float, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        lm_weight, kl_weight, temperature, chunk_tokens = settings
        wide = torch.promote_types(student_hidden.dtype, torch.float32)
        student_rows, teacher_rows = student_head[: shard.num_valid], teacher_head[: shard.num_valid]
        weight = token_weight.to(wide)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        hidden_grad = torch.zeros_like(student_hidden) if needs_grad else None
        head_grad = torch.zeros_like(student_head, dtype=wide) if needs_grad else None
        lm_sum, kl_sum = weight.new_zeros(()), weight.new_zeros(())
        for start in range(0, len(labels), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            student_logits = (student_hidden[chunk] @ student_rows.t()).to(wide)  # [n', v]
            teacher_logits = (teacher_hidden[chunk] @ teacher_rows.t()).to(wide) if kl_weight else None
            lm, kl, logits_grad = _chunk_losses(
                student_logits,
                teacher_logits,
                labels[chunk],
                weight[chunk],
                shard,
                (lm_weight, kl_weight, temperature),
                needs_grad,
            )
            lm_sum += lm
            kl_sum += kl
            if hidden_grad is not None and head_grad is not None and logits_grad is not None:
                narrow = logits_grad.to(student_hidden.dtype)
                hidden_grad[chunk] = narrow @ student_rows
                _add_product(head_grad[: shard.num_valid], narrow.t(), student_hidden[chunk])
        ctx.gradients = (hidden_grad, head_grad)  # made here and used once: no need of save_for_backward's checks
        ctx.mark_non_differentiable(lm_sum, kl_sum)
        return lm_weight * lm_sum + kl_weight * kl_sum, lm_sum, kl_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.gradients
        ctx.gradients = None
        return hidden_grad.mul_(grads[0]), head_grad.mul_(grads[0]).to(hidden_grad.dtype), *[None] * 6


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; without a temporary of the head's size where the dtypes allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _chunk_losses(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    weight: Tensor,
    shard: VocabularyShard,
    settings: tuple[float, float, float],
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """LM sum, KL sum (with tau^2), and the gradient of lm_weight * LM + kl_weight * KL by student_logits [n', v]."""
    lm_weight, kl_weight, temperature = settings
    both = [student_logits] if teacher_logits is None else [student_logits, teacher_logits]
    if shard.num_valid:
        largest = torch.stack([logits.amax(dim=1) for logits in both])
    else:
        largest = student_logits.new_full((len(both), len(labels)), -torch.inf)
    shard.reduce(largest, dist.ReduceOp.MAX)
    for logits, top in zip(both, largest, strict=True):
        logits -= top.unsqueeze(1)

    local = labels - shard.start
    is_here = (local >= 0) & (local < shard.num_valid)
    rows, columns = is_here.nonzero().squeeze(1), local[is_here]
    label_logit = torch.zeros_like(weight)
    label_logit[rows] = student_logits[rows, columns]
    student_exp = student_logits.exp()
    sums = [student_exp.sum(1), label_logit]
    if teacher_logits is not None:
        teacher_warm, excess, gap = _warm_terms(student_logits, teacher_logits, temperature)
        sums += [teacher_warm.sum(1), excess.sum(1), gap.mul_(teacher_warm).sum(1)]
    total = shard.reduce(torch.stack(sums), dist.ReduceOp.SUM)

    lm = weight @ (total[0].log() - total[1])
    kl = torch.zeros_like(lm)
    if teacher_logits is not None:
        teacher_sum, excess_sum, gap_sum = total[2:]
        kl = temperature**2 * (weight @ (torch.log1p(excess_sum / teacher_sum) + gap_sum / teacher_sum))
    if not needs_grad:
        return lm, kl, None
    grad = student_exp.mul_((lm_weight * weight / total[0]).unsqueeze(1))
    grad[rows, columns] -= lm_weight * weight[rows]
    if teacher_logits is not None:
        # softmax(z_S / tau) - softmax(z_T / tau), without subtracting the two.
        teacher_sum, excess_sum = total[2], total[3]
        scale = kl_weight * temperature * weight / (teacher_sum + excess_sum)
        grad.addcmul_(excess, scale.unsqueeze(1))
        grad.addcmul_(teacher_warm, (scale * excess_sum / teacher_sum).unsqueeze(1), value=-1.0)
    return lm, kl, grad


def _warm_terms(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """exp(z_T/tau), exp(z_S/tau) - exp(z_T/tau) and (z_T - z_S)/tau, each [n', v]; overwrites teacher_logits.

    At a high temperature the distributions nearly agree, and KL is a small difference of large numbers (at tau = 40,
    1e-3 of logarithms near 10, then times tau^2). expm1 of the gap keeps its digits; where the student's exponential is
    much the larger, so that expm1 could overflow, the plain difference is exact enough.
    """
    teacher_warm = (teacher_logits / temperature).exp_()
    gap = teacher_logits.sub_(student_logits).div_(temperature)
    excess = torch.where(
        gap > -1.0,
        torch.expm1(-gap).mul_(teacher_warm),
        (student_logits / temperature).exp_().sub_(teacher_warm),
    )
    return teacher_warm, excess, gap
