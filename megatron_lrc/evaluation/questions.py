"""Question items: of several continuations of a prompt, a model should think the right one likeliest.

    {"prompt": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}     a JSON line; 0: the first

A continuation's likelihood is the product over its tokens; prompt and continuation are tokenized together, special
tokens added as the tokenizer does it by itself. Of equally likely ones the first is preferred.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lrc.config import ConfigError
from megatron_lrc.json_files import parse_json


@dataclass(frozen=True)
class Question:
    prompt: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice


@dataclass(frozen=True)
class Continuation:
    """ids: prompt and one choice, of which the prompt's are the first `num_prompt`."""

    question: int
    choice: int
    ids: list[int]
    num_prompt: int


def read_questions(path: Path) -> list[Question]:
    """ConfigError that names the line for anything but items."""
    questions = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8 ({error}). A JSON line for each item is expected.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = parse_json(line)
            question = Question(item["prompt"], tuple(item["choices"]), item["answer"])
            texts = (question.prompt, *question.choices)
            if not all(isinstance(text, str) for text in texts) or len(question.choices) < 2:
                raise ValueError("a text and two choices or more are needed")
            if type(question.answer) is not int or not 0 <= question.answer < len(question.choices):
                raise ValueError("the answer is no index of the choices")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'{path}:{number} is no item ({type(error).__name__}: {error}). {{"prompt": TEXT, "choices": [TEXT, '
                'TEXT, ...], "answer": INDEX} is expected.'
            ) from error
        questions.append(question)
    if not questions:
        raise ConfigError(f"{path} holds no items. A JSON line for each is expected.")
    return questions


def encode_questions(questions: list[Question], tokenizer: Any) -> list[Continuation]:
    """Every choice of every question, the longest first, so that a batch has little padding."""
    found = []
    for number, question in enumerate(questions):
        num_prompt = len(tokenizer(question.prompt)["input_ids"])
        for choice, text in enumerate(question.choices):
            ids = tokenizer(question.prompt + text)["input_ids"]
            if not 0 < num_prompt < len(ids):
                raise ConfigError(
                    f"The prompt {question.prompt!r} or its choice {text!r} has no token of its own. Leave the item "
                    "out, or begin the choice with a space."
                )
            found.append(Continuation(number, choice, ids, num_prompt))
    return sorted(found, key=lambda continuation: -len(continuation.ids))


def padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """int64 [b, s] with id 0 behind shorter ones, where a causal model's other places cannot see it, and which places
    are real, bool [b, s]."""
    longest = max(map(len, sequences))
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences])
    lengths = torch.tensor([len(ids) for ids in sequences])
    return tokens, torch.arange(longest) < lengths[:, None]


def in_batches(items: list[Any], batch_size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), batch_size):
        yield items[start : start + batch_size]


@torch.inference_mode()
def accuracy(
    model: Any, questions: list[Question], continuations: list[Continuation], *, batch_size: int, vocab_size: int
) -> float:
    """The part of the questions whose right choice is preferred. vocab_size: columns of the logits that count."""
    likelihoods = [[0.0] * len(question.choices) for question in questions]
    for batch in in_batches(continuations, batch_size):
        tokens, _ = padded([continuation.ids for continuation in batch])
        logits = model(tokens.to(model.device), use_cache=False).logits[..., :vocab_size]  # [b, s, v]
        for row, item in zip(logits, batch, strict=True):
            predicted = row[item.num_prompt - 1 : len(item.ids) - 1].float().log_softmax(-1)
            labels = torch.tensor(item.ids[item.num_prompt :], device=model.device)
            likelihoods[item.question][item.choice] = predicted.gather(1, labels[:, None]).sum().item()
    preferred = [max(range(len(found)), key=found.__getitem__) for found in likelihoods]
    return sum(choice == q.answer for choice, q in zip(preferred, questions, strict=True)) / len(questions)
