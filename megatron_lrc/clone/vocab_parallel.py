"""LM and KL loss from both models' final hidden states and LM heads, split by vocabulary, in chunks.

    L_LM = -log softmax(z_S)[label]         L_KL = tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau))

Logits z = hidden @ head^T exist for one chunk only, and gradients are taken in the same pass, so memory does
not grow with tokens x vocabulary. Logits and all that follows are fp32 also for bf16 and fp16 models: at tau
= 40 a bf16 log-softmax turns the KL's gradient by 45 to 65 degrees, and logits rounded to bf16 by as much
once both models nearly agree. Under tensor parallelism each rank has a slice of the vocabulary; per token two
small reductions (the largest logits, then seven sums) give the exact loss, and the gradients stay local.
Other divergences than this KL are in `divergences.py`.
dhidden is then a partial sum over ranks, which the backward of the sequence-parallel gather sums.

Rejected: gathering logits. It costs the full matrix, and its gradient comes out tp times too large.

Notation: n tokens, d and D hidden sizes, v this rank's part of the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lrc.clone.divergences import BothLogits, GradientScales, divergence, sums_of_both
from megatron_lrc.clone.fusion import fused_on_cuda
from megatron_lrc.clone.products import add_product, wide_product
from megatron_lrc.clone.vocabulary_shard import VocabularyShard
from megatron_lrc.config import FORWARD


@dataclass(frozen=True, slots=True)
class HeadLossSettings:
    """lm, kl: weights of the losses; kl counts tau^2 * KL. chunk_tokens: tokens whose logits exist at once.
    loss_scale: what the main loss is multiplied by before backward (fp16 loss scaling), 1 otherwise. logits_scaling:
    what both models' logits are divided by. logits_soft_cap: c of c tanh(logits / c), which takes the place of both
    models' logits; 0: none. beta, top_k: which divergence takes the place of the KL, and of how many of the teacher's
    tokens, 0 of all (`divergences.py`)."""

    lm: float
    kl: float
    temperature: float
    chunk_tokens: int
    loss_scale: Tensor | float = 1.0
    logits_scaling: float = 1.0
    logits_soft_cap: float = 0.0
    beta: float = FORWARD
    top_k: int = 0


Sums = TypeVar("Sums", bound="HeadSums")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSums:
    """Sums over weighted tokens, scalars. They have names and no places, so that none can be taken for another;
    only `stacked` and `of` know an order, for what goes through one tensor.

    What is not computed is 0: the teacher's part in training without KL, which has no use for it, and what says how
    far the models agree wherever there are gradients; a validation has none.
    """

    lm: Tensor
    kl: Tensor
    teacher_lm: Tensor
    teacher_kl: Tensor  # KL(teacher || student) at temperature 1
    same_top1: Tensor  # tokens whose likeliest successor is the same for both models
    covered: Tensor  # the teacher's probability within its top k, at the loss's temperature

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls: type[Sums], stacked: Tensor) -> Sums:
        """stacked [n]: what `stacked` gives, or a sum of such."""
        return cls(**dict(zip(cls.names(), stacked, strict=True)))

    def named(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names()}

    def stacked(self) -> Tensor:
        """[n], one entry for each name."""
        return torch.stack(list(self.named().values()))


def lm_and_kl_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    student_head: Tensor,
    teacher_head: Tensor | None,
    labels: Tensor,
    token_weight: Tensor,
    *,
    shard: VocabularyShard,
    settings: HeadLossSettings,
    is_embedding: bool = False,
) -> tuple[Tensor, HeadSums]:
    """(settings.lm * L_LM + settings.kl * L_KL, sums), over weighted tokens. The first has a gradient.

    Where student_head has a `main_grad` in fp32 or better, its gradient is added there at once, chunk by chunk, and
    autograd gets nothing of it. That takes backward to begin with settings.loss_scale, as megatron-core's schedules do.
    is_embedding: the head is the embedding of this stage too, whose gradient autograd goes on to bring.

    student_hidden [n, d], teacher_hidden [n, D]: all tokens on every rank. Heads [v, d], [v, D]: own rows. Without a
    teacher its arguments are None, and settings.kl is 0.
    labels [n]: global vocabulary ids. The sums are complete on every rank, in fp32 (fp64 for fp64 input).
    """
    models = (student_hidden, student_head, teacher_hidden, teacher_head)
    how = (shard, settings, is_embedding, torch.is_grad_enabled())
    loss, sums = _LmAndKl.apply(*models, labels, token_weight, *how)
    return loss, HeadSums.of(sums)


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
        is_embedding: bool,
        is_grad_enabled: bool,  # for the caller: here it is not, and ctx.needs_input_grad does not say so
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(student_hidden.dtype, torch.float32)
        student_rows = student_head[: shard.num_valid]
        weight = token_weight.to(wide)
        needs_grad = is_grad_enabled and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        hidden_grad = torch.zeros_like(student_hidden) if needs_grad else None
        head_grad = _HeadGradient(student_head, shard.num_valid, wide) if needs_grad else None
        is_teacher_wanted = settings.kl or not needs_grad
        sums = weight.new_zeros(len(HeadSums.names()))
        for start in range(0, len(labels), settings.chunk_tokens):
            chunk = slice(start, start + settings.chunk_tokens)
            student_logits = _logits(student_hidden[chunk], student_rows, settings)  # [n', v]
            teacher_logits = None
            if teacher_hidden is not None and teacher_head is not None and is_teacher_wanted:
                teacher_logits = _logits(teacher_hidden[chunk], teacher_head[: shard.num_valid], settings)
            slope = _cap_slope(student_logits, settings.logits_soft_cap) if needs_grad else None
            for part in _parts(student_logits, shard):
                sums += _replace_by_gradient(
                    student_logits[part],
                    None if teacher_logits is None else teacher_logits[part],
                    labels[chunk][part],
                    weight[chunk][part],
                    shard,
                    settings,
                    needs_grad,
                )
            del teacher_logits  # before the next chunk's is made
            if hidden_grad is not None and head_grad is not None:
                # Scaled before it is narrowed: most of a softmax is below what fp16 can hold.
                scale = settings.loss_scale / settings.logits_scaling
                if isinstance(scale, Tensor) or scale != 1.0:
                    student_logits.mul_(scale)
                if slope is not None:
                    student_logits.mul_(slope)
                    del slope
                narrow = student_logits.to(student_hidden.dtype)
                del student_logits
                hidden_grad[chunk] = narrow @ student_rows
                head_grad.add(narrow.t(), student_hidden[chunk])
                del narrow
        ctx.gradients = (hidden_grad, head_grad)  # made and used once: without save_for_backward's checks
        ctx.is_embedding = is_embedding
        ctx.loss_scale = settings.loss_scale
        ctx.mark_non_differentiable(sums)
        named = HeadSums.of(sums)
        return settings.lm * named.lm + settings.kl * named.kl, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.gradients
        ctx.gradients = None
        factor = grads[0] / ctx.loss_scale  # the scale is in the gradients already
        if not factor.is_cuda and factor == 1:  # on CPU no wait, and a pass over a gradient saved
            factor = None
        if factor is not None:
            hidden_grad.mul_(factor)
        return hidden_grad, head_grad.for_autograd(factor, ctx.is_embedding), *[None] * 8


def _logits(hidden: Tensor, rows: Tensor, settings: HeadLossSettings) -> Tensor:
    """[n', v], in fp32 or better, of tokens [n', h] and rows of the head [v, h]."""
    logits = wide_product(hidden, rows)
    if settings.logits_scaling != 1.0:
        logits.div_(settings.logits_scaling)
    cap = settings.logits_soft_cap
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def _cap_slope(capped: Tensor, cap: float) -> Tensor | None:
    """What the gradient of capped logits [n', v] is multiplied by to be that of the logits; None without a cap."""
    return None if not cap else (capped / cap).square_().neg_().add_(1.0)


class _HeadGradient:
    """The gradient of an LM head [v, d] as chunks of tokens add to it: in the head's `main_grad`, where it has one that
    is wide enough, or in a matrix of its own."""

    def __init__(self, head: Tensor, num_valid: int, wide: torch.dtype):
        """num_valid: rows that get a gradient; that of the others is 0."""
        main_grad: Tensor | None = getattr(head, "main_grad", None)
        self._head, self._num_valid = head, num_valid
        if main_grad is not None and main_grad.dtype == wide:
            self._total, self._is_in_main, self._is_empty = main_grad, True, False
        else:
            self._total, self._is_in_main, self._is_empty = torch.empty_like(head, dtype=wide), False, True

    def add(self, left: Tensor, right: Tensor) -> None:
        """left [num_valid, n] @ right [n, d]."""
        add_product(self._total[: self._num_valid], left, right, is_first=self._is_empty)
        self._is_empty = False

    def for_autograd(self, factor: Tensor | None, is_embedding: bool) -> Tensor | None:
        """What `backward` gives for the head, times a factor; None is 1."""
        if not self._is_in_main:
            self._total[0 if self._is_empty else self._num_valid :].zero_()
            total = self._total if factor is None else self._total.mul_(factor)
            return total.to(self._head.dtype)
        if factor is not None and not factor.is_cuda:
            raise RuntimeError("backward has to begin with the loss scale that the head's gradient was made with")
        if is_embedding:
            return None
        # As megatron-core's fused layers do: what autograd gets has the shape alone, and the hooks are told so.
        self._head.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return self._head.new_zeros(()).expand_as(self._head)


#: Logits of one model that are worked on at once on CPU: temporaries of 1 MiB stay in the processor's cache.
_LOGITS_IN_CACHE = 1 << 18


def _parts(logits: Tensor, shard: VocabularyShard) -> Iterator[slice]:
    """Tokens of a chunk that are worked on together: on CPU a few, but under tensor parallelism all of them,
    since each part costs two reductions there; on CUDA all, in few kernels."""
    at_once = len(logits)
    if shard.group is None and not logits.is_cuda:
        at_once = max(1, _LOGITS_IN_CACHE // max(1, logits.shape[1]))
    return (slice(start, start + at_once) for start in range(0, len(logits), at_once))


def _replace_by_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    weight: Tensor,
    shard: VocabularyShard,
    settings: HeadLossSettings,
    needs_grad: bool,
) -> Tensor:
    """Some tokens' `HeadSums`, stacked. With needs_grad it overwrites student_logits [n', v]
    by the gradient of the weighted losses."""
    # Softmax needs the largest logit of the whole vocabulary and sums over all of it: two reductions of [.,
    # n'] over the ranks. After them each rank has what it takes to turn its own logits into their gradient.
    temperature = settings.temperature
    both = [student_logits] if teacher_logits is None else [student_logits, teacher_logits]
    if shard.num_valid:
        largest = torch.stack([logits.amax(dim=1) for logits in both])
    else:
        largest = student_logits.new_full((len(both), len(labels)), -torch.inf)
    shard.reduce(largest, dist.ReduceOp.MAX)

    # A label lies on one rank. The others look up some row of theirs, and count it as 0 in the sum over ranks.
    local = labels - shard.start
    is_here = (local >= 0) & (local < shard.num_valid)
    own_label = local.clamp(0, max(shard.num_valid - 1, 0)).unsqueeze(1)

    def logit_of_label(logits: Tensor, top: Tensor) -> Tensor:
        if not shard.num_valid:
            return torch.zeros_like(top)
        return torch.where(is_here, logits.gather(1, own_label).squeeze(1) - top, 0.0)

    sums = [logit_of_label(logits, top) for logits, top in zip(both, largest, strict=True)]
    if teacher_logits is None:
        sums.append(_student_sum(student_logits, largest[0]))
        student_label, student_sum = shard.reduce(torch.stack(sums), dist.ReduceOp.SUM)
        kl = teacher_lm = teacher_kl = num_same = covered = student_sum.new_zeros(())
        if needs_grad:
            _student_gradient(student_logits, largest[0], settings.lm * weight / student_sum)
    else:
        sums += sums_of_both(student_logits, teacher_logits, largest[0], largest[1], temperature)
        total = shard.reduce(torch.stack(sums), dist.ReduceOp.SUM)
        student_label, teacher_label, student_sum, teacher_sum, warm_sum, excess_sum, gap_sum = total
        teacher_lm = weight @ (teacher_sum.log() - teacher_label)
        teacher_kl = num_same = covered = teacher_lm.new_zeros(())
        scales = None
        if not needs_grad:
            gap = _gap_sum(student_logits, teacher_logits, largest[0], largest[1])
            gap = shard.reduce(gap, dist.ReduceOp.SUM)
            teacher_kl = weight @ (gap / teacher_sum - teacher_sum.log() + student_sum.log())
            num_same = weight @ _have_same_likeliest(both, largest, shard).to(weight.dtype)
        else:
            scales = GradientScales(settings.lm * weight / student_sum, settings.kl * temperature * weight)
        pair = BothLogits(
            student_logits,
            teacher_logits,
            student_top=largest[0],
            teacher_top=largest[1],
            warm_sum=warm_sum,
            excess_sum=excess_sum,
            gap_sum=gap_sum,
            temperature=temperature,
            shard=shard,
        )
        divergences, shares = divergence(pair, settings.beta, settings.top_k, scales)
        kl = temperature**2 * (weight @ divergences)
        if shares is not None:
            covered = weight @ shares
    if needs_grad and shard.num_valid:
        student_logits.scatter_add_(1, own_label, (-settings.lm * weight * is_here).unsqueeze(1))
    lm = weight @ (student_sum.log() - student_label)
    found = HeadSums(lm=lm, kl=kl, teacher_lm=teacher_lm, teacher_kl=teacher_kl, same_top1=num_same, covered=covered)
    return found.stacked()


def _have_same_likeliest(both: list[Tensor], largest: Tensor, shard: VocabularyShard) -> Tensor:
    """[n'], bool: whether the first of the student's likeliest tokens is the teacher's."""
    likeliest = torch.full_like(largest, torch.iinfo(torch.int64).max, dtype=torch.int64)  # [2, n']
    if shard.num_valid:
        for ids, logits, top in zip(likeliest, both, largest, strict=True):
            here, place = logits.max(dim=1)
            ids.copy_(torch.where(here == top, place + shard.start, ids))
    student, teacher = shard.reduce(likeliest, dist.ReduceOp.MIN)
    return student == teacher


# Each of these is one pass over logits [n', v], less their largest [n'], as those of `divergences.py` are.


@fused_on_cuda
def _student_sum(logits: Tensor, top: Tensor) -> Tensor:
    """Sum of exp(z - top), [n']."""
    return (logits - top.unsqueeze(1)).exp_().sum(1)


@fused_on_cuda
def _student_gradient(logits: Tensor, top: Tensor, scale: Tensor) -> None:
    """logits <- scale * exp(z - top)."""
    logits.sub_(top.unsqueeze(1)).exp_().mul_(scale.unsqueeze(1))


@fused_on_cuda
def _gap_sum(student_logits: Tensor, teacher_logits: Tensor, student_top: Tensor, teacher_top: Tensor) -> Tensor:
    """Sum of (z_T - z_S) exp(z_T), of logits less the largest: [n']."""
    student, teacher = student_logits - student_top.unsqueeze(1), teacher_logits - teacher_top.unsqueeze(1)
    gap = student.neg_().add_(teacher)
    return teacher.exp_().mul_(gap).sum(1)
