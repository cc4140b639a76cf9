"""Log-likelihoods of several continuations of one context from one sequence, for lm-evaluation-harness.

The harness runs context and continuation once for each answer, and makes logits of every token. Here the answers of a
question follow its context side by side: each has the positions of a direct successor, sees the context and itself, and
not the others. Logits are made only where a token of an answer is predicted. That is the same arithmetic, up to
rounding, on fewer tokens.

s tokens of a sequence, b sequences of a batch. Only models all of whose layers attend to everything before can be asked
so (`can_share`); for the others the harness does it its own way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Request = tuple[Any, list[int], list[int]]  # (texts, context, continuation), as the harness has it
_PADDING = -1


@dataclass
class Question:
    """A context, and its continuations -> the numbers of the requests that ask for them."""

    context: tuple[int, ...]
    answers: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Of its sequence: an answer's last token is predicted, not read."""
        return len(self.context) + sum(len(answer) - 1 for answer in self.answers)

    def lay_out(self) -> tuple[list[int], list[int], list[int]]:
        """Of each token of the sequence: its id, its position, and whose it is (0 the context's, then the answers')."""
        tokens = [*self.context]
        positions, owners = list(range(len(self.context))), [0] * len(self.context)
        for number, answer in enumerate(self.answers, start=1):
            tokens += answer[:-1]
            positions += range(len(self.context), len(self.context) + len(answer) - 1)
            owners += [number] * (len(answer) - 1)
        return tokens, positions, owners

    def places(self) -> list[list[int]]:
        """For each answer the places in the sequence that predict its tokens."""
        found, start = [], len(self.context)
        for answer in self.answers:
            found.append([len(self.context) - 1, *range(start, start + len(answer) - 1)])
            start += len(answer) - 1
        return found


def can_share(model: Any) -> bool:
    """Whether every layer of a transformers model attends to all that a mask allows it."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    takes_masks = getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
    return kinds == {"full_attention"} and not has_window and takes_masks


def harness_model(model: Any, **settings: Any) -> Any:
    """The harness's wrapper of a loaded model, with the method of this module where the model allows it."""
    wrapper = import_module("lm_eval.models.huggingface").HFLM
    if can_share(model):
        wrapper = type("SharedContexts", (wrapper,), {"_loglikelihood_tokens": _loglikelihood_tokens})
    return wrapper(pretrained=model, **settings)


def _loglikelihood_tokens(
    self: Any, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
) -> list[tuple[float, bool]]:
    """The harness's method of this name: log-likelihood of each request, and whether its tokens are the likeliest."""
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    questions = gather(requests, self.max_length)
    size = override_bs or self.batch_size
    progress = import_module("tqdm").tqdm(total=len(requests), disable=disable_tqdm, desc="answers", mininterval=5)
    for start in range(0, len(questions), size):
        batch = questions[start : start + size]
        for question, scores in zip(batch, likelihoods(self.model, batch), strict=True):
            for numbers, score in zip(question.answers.values(), scores, strict=True):
                progress.update(len(numbers))
                for number in numbers:
                    found[number] = score
    progress.close()
    return found


def gather(requests: Sequence[Request], max_length: int) -> list[Question]:
    """Questions of all requests, the longest first. What exceeds max_length is cut from the left, as there."""
    questions: dict[tuple[int, ...], Question] = {}
    for number, (_, context, continuation) in enumerate(requests):
        kept = tuple(context[-(max_length + 1 - len(continuation)) :])
        question = questions.setdefault(kept, Question(kept))
        question.answers.setdefault(tuple(continuation), []).append(number)
    return sorted(questions.values(), key=lambda question: -question.length)


@torch.inference_mode()
def likelihoods(model: Any, questions: Sequence[Question]) -> list[list[tuple[float, bool]]]:
    """For each question and each of its answers: log-likelihood in nats, whether its tokens are the likeliest."""
    length = max(question.length for question in questions)
    rows = [question.lay_out() for question in questions]
    tokens, positions = (_padded([row[part] for row in rows], length, 0, model.device) for part in (0, 1))
    owners = _padded([row[2] for row in rows], length, _PADDING, model.device)
    needed = sorted({place for question in questions for places in question.places() for place in places})
    logits = model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=_mask(owners, model.dtype),
        logits_to_keep=torch.tensor(needed, device=model.device),
        use_cache=False,
    ).logits  # [b, needed, v]
    column = {place: number for number, place in enumerate(needed)}
    scores = []
    for question, row in zip(questions, logits, strict=True):
        answers = zip(question.answers, question.places(), strict=True)
        scores.append([_score(row[[column[place] for place in places]], answer) for answer, places in answers])
    return scores


def _score(logits: Tensor, answer: tuple[int, ...]) -> tuple[float, bool]:
    """logits: [t, v] where the answer's t tokens are predicted."""
    labels = torch.tensor(answer, device=logits.device)
    by_token = logits.float().log_softmax(-1).gather(1, labels[:, None])
    return by_token.sum().item(), bool((logits.argmax(-1) == labels).all())


def _padded(rows: Sequence[list[int]], length: int, value: int, device: torch.device) -> Tensor:
    """int64 [b, s]."""
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)


def _mask(owners: Tensor, dtype: torch.dtype) -> Tensor:
    """[b, 1, s, s], to be added to attention scores: 0 where a token (row) sees another (column).

    owners: [b, s]. Padding comes last, so that no token sees it; it sees something, so that no row is empty.
    """
    of_row, of_column = owners[:, :, None], owners[:, None, :]
    earlier = torch.ones(owners.shape[1], owners.shape[1], dtype=torch.bool, device=owners.device).tril()
    seen = earlier & ((of_column == 0) | (of_column == of_row))
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
