"""Which part of a rendered chat is the assistant's: as characters of the text, then as tokens.

    template with {% generation %} markers     what stands between them, as transformers' assistant mask has it
    any other                                  a turn is what the chat up to it has more than the chat before it
                                               with the generation prompt, from which a model answers

Of the second kind a chat up to any turn has to be the beginning of the whole text. A template that writes a turn
otherwise once others follow (it takes out the reasoning, or puts the system prompt before the last question) is
refused, and so is one that writes a header before the answer and has no generation prompt: neither says where an answer
begins. White space after a turn's last special token, as `<|im_end|>` has a newline, is not of the turn: the model is
stopped by that token.

A token belongs to the assistant if all of it does. One that holds text of both (a header's newline and that of the
answer) is known to be there, but to nobody where the two meet in it: it does not count.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy

from megatron_lrc.config import ConfigError
from megatron_lrc.data.encoders import Encode
from megatron_lrc.data.limits import TakesTooMuch

Messages = list[dict[str, Any]]
Span = tuple[int, int]  # characters from, to
Render = Callable[[Messages, bool], str]  # a chat, with the generation prompt or without

ASSISTANT = "assistant"
_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MOST_SHARED = 8  # tokens about a boundary that are not known to be of one side or the other
_ADVICE = (
    "Take a template with {% generation %} markers, or give --no-assistant-mask, with which every token of the chats "
    "is trained on"
)


@dataclass(frozen=True)
class MarkedText:
    """A rendered chat, and the parts of it that are the assistant's: in order, apart from each other."""

    text: str
    spans: tuple[Span, ...]

    def without_prefix(self, prefix: str) -> "MarkedText":
        if not prefix or not self.text.startswith(prefix):
            return self
        count = len(prefix)
        return MarkedText(self.text[count:], tuple((max(start - count, 0), end - count) for start, end in self.spans))


@dataclass(frozen=True)
class MarkedIds:
    """The token ids of a chat, and which are the assistant's: [tokens], bool."""

    ids: list[int]
    mask: numpy.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def has_markers(template: str) -> bool:
    return _MARKER.search(template) is not None


def find_turns(
    messages: Messages, text: str, render: Render, *, end_tokens: Sequence[str], is_headerless: bool
) -> tuple[Span, ...]:
    """The assistant's turns in the text of these messages, by rendering what comes before them. ConfigError where the
    template does not let them be found; it completes "FILE:LINE: ".

    end_tokens: the tokenizer's special tokens. is_headerless: what `writes_no_header` says of the template.
    """
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        name = f"message {number + 1}"
        before, after = messages[:number], messages[: number + 1]
        try:
            opened = render(before, True)
            has_prompt = is_headerless or opened != render(before, False)
            ended = text if len(after) == len(messages) else render(after, False)
        except TakesTooMuch:
            raise
        except Exception as error:
            raise ConfigError(
                f"which tokens are the assistant's is not known, because the chat template refuses to render what "
                f"comes before or up to {name} by itself ({type(error).__name__}). {_ADVICE}"
            ) from error
        if not (text.startswith(ended) and ended.startswith(opened)):
            raise ConfigError(
                f"which tokens are the assistant's is not known, because the chat template writes {name}, or what "
                f"comes before it, otherwise in the whole chat than in its beginning. {_ADVICE}"
            )
        if not has_prompt:
            raise ConfigError(
                f"which tokens are the assistant's is not known, because the chat template has no generation prompt "
                f"(add_generation_prompt), which says where {name} begins after its header. {_ADVICE}"
            )
        end = _end_of_turn(text, len(opened), len(ended), end_tokens)
        if end > len(opened):
            spans.append((len(opened), end))
    return tuple(spans)


def writes_no_header(question: Messages, answer: Messages, mark: str, render: Render) -> bool:
    """Whether a template writes an answer right behind the question, as Mistral's does, so that no generation prompt is
    needed. question: a chat that waits for an answer. answer: the same with one that is `mark`."""
    try:
        opened, closed, text = render(question, True), render(question, False), render(answer, False)
    except Exception:
        return False
    return opened == closed and text.startswith(opened) and text[len(opened) :].lstrip().startswith(mark)


def _end_of_turn(text: str, start: int, end: int, end_tokens: Sequence[str]) -> int:
    stripped = text[start:end].rstrip()
    return start + len(stripped) if stripped.endswith(tuple(end_tokens)) else end


def mark_tokens(chat: MarkedText, encode: Encode) -> MarkedIds:
    """A chat's ids, those of its whole text, and which of them are the assistant's."""
    bounds = sorted({bound for span in chat.spans for bound in span})
    edges = [0, *bounds, len(chat.text)]
    ids, *parts = encode([chat.text, *(chat.text[start:end] for start, end in pairwise(edges))])
    mask = numpy.zeros(len(ids), dtype=bool)
    if [token for part in parts for token in part] == ids:  # every boundary is one between tokens
        ends = numpy.cumsum([len(part) for part in parts]).tolist()
        places = {bound: (place, place) for bound, place in zip(bounds, ends, strict=False)}
    else:
        places = {bound: _place_of(bound, chat.text, ids, encode) for bound in bounds}
    for start, end in chat.spans:
        mask[places[start][1] : places[end][0]] = True
    return MarkedIds(ids, mask)


def _place_of(bound: int, text: str, ids: list[int], encode: Encode) -> tuple[int, int]:
    """The tokens from 0 to the first of these are of the text before the boundary; those from the second on of what is
    after it. Equal ids at either end stand for equal text, so that what is between is all that is not known."""
    before, after = encode([text[:bound], text[bound:]])
    end = _num_equal(ids, before)
    if end == len(before):
        return end, end
    start = len(ids) - _num_equal(ids[::-1], after[::-1])
    if start - end > _MOST_SHARED:
        raise ConfigError(
            f"which tokens are the assistant's is not known, because the tokenizer divides the text up to character "
            f"{bound} otherwise than the beginning of the whole, {start - end} tokens of it. Give --no-assistant-mask, "
            "with which every token of the chats is trained on"
        )
    return min(end, start), max(end, start)


def _num_equal(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
