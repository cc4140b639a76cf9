"""LM and KL loss from both models' final hidden states and LM heads, split by vocabulary, a chunk of tokens at a time.

    L_LM = -log softmax(z_S)[label]         L_KL = tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau))

Logits z = hidden @ head^T exist for one chunk only, and gradients are taken in the same pass, so memory does not grow
with tokens x vocabulary. Logits and all that follows are fp32 also for bf16 and fp16 models: at tau = 40 a bf16
log-softmax turns the KL's gradient by 45 to 65 degrees, and logits rounded to bf16 by as much once both models nearly
agree. Under tensor parallelism each rank has a slice of the vocabulary; per token two small reductions (the largest
logits, then seven sums) give the exact loss, and the gradients stay local. dhidden is then a partial sum over ranks,
which the backward of the sequence-parallel gather sums.

Rejected: gathering logits. It costs the full matrix, and its gradient comes out tensor-parallel-size times too large.

Notation: n tokens, d and D hidden sizes, v this rank's part of the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.torch_version import TorchVersion


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


@dataclass(frozen=True, slots=True)
class HeadLossSettings:
    """lm, kl: weights of the two losses; kl counts tau^2 * KL. chunk_tokens: tokens whose logits exist at once.

    loss_scale: what the main loss is multiplied by before backward (fp16 loss scaling), 1 otherwise.
    """

    lm: float
    kl: float
    temperature: float
    chunk_tokens: int
    loss_scale: Tensor | float = 1.0


def lm_and_kl_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    token_weight: Tensor,
    *,
    shard: VocabularyShard,
    settings: HeadLossSettings,
) -> tuple[Tensor, Tensor]:
    """(settings.lm * L_LM + settings.kl * L_KL, the sums [L_LM, L_KL, the teacher's L_LM]), over weighted tokens.

    The first has a gradient. The teacher is left out (zeros) in training without KL, which has no use for it.

    student_hidden [n, d], teacher_hidden [n, D]: all tokens on every rank. Heads [v, d], [v, D]: this rank's rows.
    labels [n]: global vocabulary ids. The sums are complete on every rank, in fp32 (fp64 for fp64 input).
    """
    models = (student_hidden, student_head, teacher_hidden, teacher_head)
    return _LmAndKl.apply(*models, labels, token_weight, shard, settings, torch.is_grad_enabled())


def lm_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    token_weight: Tensor,
    *,
    shard: VocabularyShard,
    chunk_tokens: int,
    loss_scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(L_LM, the sums [L_LM, 0, 0]), over weighted tokens, of one model; all else as in `lm_and_kl_loss`."""
    settings = HeadLossSettings(1.0, 0.0, temperature=1.0, chunk_tokens=chunk_tokens, loss_scale=loss_scale)
    models = (hidden, head, None, None)
    return _LmAndKl.apply(*models, labels, token_weight, shard, settings, torch.is_grad_enabled())


class _LmAndKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        labels: Tensor,
        token_weight: Tensor,
        shard: VocabularyShard,
        settings: HeadLossSettings,
        is_grad_enabled: bool,  # for the caller: here it is not, and ctx.needs_input_grad does not say so
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(student_hidden.dtype, torch.float32)
        student_rows = student_head[: shard.num_valid]
        weight = token_weight.to(wide)
        needs_grad = is_grad_enabled and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        hidden_grad = torch.zeros_like(student_hidden) if needs_grad else None
        head_grad = torch.zeros_like(student_head, dtype=wide) if needs_grad else None
        sums = weight.new_zeros(3)
        for start in range(0, len(labels), settings.chunk_tokens):
            chunk = slice(start, start + settings.chunk_tokens)
            student_logits = wide_product(student_hidden[chunk], student_rows)  # [n', v]
            teacher_logits = None
            if teacher_hidden is not None and teacher_head is not None and (settings.kl or not needs_grad):
                teacher_logits = wide_product(teacher_hidden[chunk], teacher_head[: shard.num_valid])
            chunk_sums, logits_grad = _chunk_losses(
                student_logits, teacher_logits, labels[chunk], weight[chunk], shard, settings, needs_grad
            )
            sums += chunk_sums
            if hidden_grad is not None and head_grad is not None and logits_grad is not None:
                # Scaled before it is narrowed: most of a softmax is below what fp16 can hold.
                narrow = logits_grad.mul_(settings.loss_scale).to(student_hidden.dtype)
                hidden_grad[chunk] = narrow @ student_rows
                _add_product(head_grad[: shard.num_valid], narrow.t(), student_hidden[chunk])
        ctx.gradients = (hidden_grad, head_grad)  # made here and used once: no need of save_for_backward's checks
        ctx.loss_scale = settings.loss_scale
        ctx.mark_non_differentiable(sums)
        return settings.lm * sums[0] + settings.kl * sums[1], sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.gradients
        ctx.gradients = None
        factor = grads[0] / ctx.loss_scale  # the scale is in the gradients already
        return hidden_grad.mul_(factor), head_grad.mul_(factor).to(hidden_grad.dtype), *[None] * 7


#: torch.mm can give fp32 for narrower operands on CUDA.
HAS_WIDE_GEMM = TorchVersion(torch.__version__) >= "2.8"

#: Rows of a head that are widened at once, where no GEMM gives fp32 for narrower operands.
_ROWS_AT_ONCE = 8192


def wide_product(hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden [n, d] @ rows [v, d]^T -> [n, v] in fp32 (fp64 for fp64), never rounded to the operands' dtype."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.dtype == wide:
        return hidden @ rows.t()
    if hidden.is_cuda and HAS_WIDE_GEMM:
        return torch.mm(hidden, rows.t(), out_dtype=wide)  # type: ignore[call-overload]
    product, wide_hidden = hidden.new_empty(len(hidden), len(rows), dtype=wide), hidden.to(wide)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        torch.mm(wide_hidden, rows[part].to(wide).t(), out=product[:, part])
    return product


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
    settings: HeadLossSettings,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums [LM, tau^2 KL, the teacher's LM], and the gradient of the weighted losses by student_logits [n', v]."""
    temperature = settings.temperature
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

    def logit_of_label(logits: Tensor) -> Tensor:
        return torch.zeros_like(weight).index_put_((rows,), logits[rows, columns])

    student_exp = student_logits.exp()
    sums = [student_exp.sum(1), logit_of_label(student_logits)]
    if teacher_logits is not None:
        sums += [teacher_logits.exp().sum(1), logit_of_label(teacher_logits)]
        teacher_warm, excess, gap = _warm_terms(student_logits, teacher_logits, temperature)
        sums += [teacher_warm.sum(1), excess.sum(1), gap.mul_(teacher_warm).sum(1)]
    total = shard.reduce(torch.stack(sums), dist.ReduceOp.SUM)

    lm = weight @ (total[0].log() - total[1])
    kl = teacher_lm = torch.zeros_like(lm)
    if teacher_logits is not None:
        teacher_lm = weight @ (total[2].log() - total[3])
        teacher_sum, excess_sum, gap_sum = total[4:]
        kl = temperature**2 * (weight @ (torch.log1p(excess_sum / teacher_sum) + gap_sum / teacher_sum))
    chunk_sums = torch.stack([lm, kl, teacher_lm])
    if not needs_grad:
        return chunk_sums, None
    grad = student_exp.mul_((settings.lm * weight / total[0]).unsqueeze(1))
    grad[rows, columns] -= settings.lm * weight[rows]
    if teacher_logits is not None:
        # softmax(z_S / tau) - softmax(z_T / tau), without subtracting the two.
        teacher_sum, excess_sum = total[4], total[5]
        scale = settings.kl * temperature * weight / (teacher_sum + excess_sum)
        grad.addcmul_(excess, scale.unsqueeze(1))
        grad.addcmul_(teacher_warm, (scale * excess_sum / teacher_sum).unsqueeze(1), value=-1.0)
    return chunk_sums, grad


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
