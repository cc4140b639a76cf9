"""Held-out LM loss of a model, and its agreement with a teacher, on the same tokens in one pass.

Whatever the models compute in, softmax, loss and KL are in float32 and their sums in float64, some tokens at a time:
log-probabilities of a whole batch would take more memory than the models. b batch, s sequence, v vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS_AT_ONCE = 512  # whose log-probabilities are in memory together


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Means over `tokens` labels. LM losses and KL in nats per token; kl: of teacher to student, at temperature 1.

    next_token_accuracy: the part of the labels that the model thinks likeliest. top1_agreement: the part of the places
    where it thinks the same token likeliest as the teacher does.
    """

    tokens: int
    lm_loss: float
    perplexity: float
    next_token_accuracy: float
    teacher_lm_loss: float | None = None
    teacher_perplexity: float | None = None
    teacher_next_token_accuracy: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Without what was not measured; what is not finite becomes None, which JSON can say."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def measure(
    model: Any, batches: Iterable[Tensor], *, teacher: Any = None, vocab_size: int | None = None
) -> tuple[Figures, Tensor]:
    """Figures over batches of int64 [b, s + 1], and the float64 sums they come from, which can be added up.

    vocab_size: columns of the logits that count; default all those of the model. Both models are on one device.
    """
    columns = int(model.config.vocab_size) if vocab_size is None else vocab_size
    sums = torch.zeros(7, dtype=torch.float64, device=model.device)
    with torch.inference_mode():
        for tokens in batches:
            tokens = tokens.to(model.device)
            student_logits = _logits(model, tokens, columns)
            teacher_logits = student_logits if teacher is None else _logits(teacher, tokens, columns)
            labels = tokens[:, 1:].flatten()  # [b * s]
            parts = (tensor.split(TOKENS_AT_ONCE) for tensor in (student_logits, teacher_logits, labels))
            for part in zip(*parts, strict=True):
                sums += _sums_of(*part, with_teacher=teacher is not None)
    return figures_of(sums, with_teacher=teacher is not None), sums


def _logits(model: Any, tokens: Tensor, vocab_size: int) -> Tensor:
    """[b * s, v], in the model's dtype."""
    return model(tokens[:, :-1], use_cache=False).logits[..., :vocab_size].flatten(0, 1)


def _sums_of(student: Tensor, teacher: Tensor, labels: Tensor, *, with_teacher: bool) -> Tensor:
    """float64 [7]: tokens, loss, hits; the teacher's loss, hits; KL, agreeing places. The last four 0 without one.

    student, teacher: logits [t, v]. labels: [t].
    """
    log_q = F.log_softmax(student.float(), dim=-1)
    guess = student.argmax(-1)
    by_token = [torch.ones_like(labels), F.nll_loss(log_q, labels, reduction="none"), guess == labels]
    if with_teacher:
        log_p = F.log_softmax(teacher.float(), dim=-1)
        other = teacher.argmax(-1)
        by_token += [F.nll_loss(log_p, labels, reduction="none"), other == labels]
        by_token += [F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1), guess == other]
    else:
        by_token += [torch.zeros_like(labels)] * 4
    return torch.stack([values.double().sum() for values in by_token])


def figures_of(sums: Tensor, *, with_teacher: bool) -> Figures:
    """Means from the sums of `measure`."""
    tokens, *totals = sums.tolist()
    loss, hits, teacher_loss, teacher_hits, kl, agreeing = (total / tokens for total in totals)
    compared: dict[str, float] = {}
    if with_teacher:
        compared = {
            "teacher_lm_loss": teacher_loss,
            "teacher_perplexity": perplexity_of(teacher_loss),
            "teacher_next_token_accuracy": teacher_hits,
            "kl": kl,
            "top1_agreement": agreeing,
        }
    return Figures(
        tokens=round(tokens), lm_loss=loss, perplexity=perplexity_of(loss), next_token_accuracy=hits, **compared
    )


def perplexity_of(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # exp(710) is beyond a float
