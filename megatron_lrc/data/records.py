"""What one line holds: a JSON object, and under its keys texts, chats or token ids.

The message of every ConfigError here completes "FILE:LINE: ".
"""

import codecs
import json
import re
from typing import Any

from megatron_lrc.config import ConfigError
from megatron_lrc.data.assistant_turns import MarkedText
from megatron_lrc.data.chat_template import ChatTemplate
from megatron_lrc.data.chats import read_chat
from megatron_lrc.data.json_kinds import kind_named
from megatron_lrc.data.lines import LONGEST_LINE, TOO_LONG

_ONE_PER_LINE = "; an object on each line is expected, not one JSON document over the whole file"
_MARK = "\ufeff"
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half a pair as \ud83d; no UTF-8 can


def parse_record(line: bytes) -> dict[str, Any]:
    if line == TOO_LONG:
        raise ConfigError(
            f"longer than {LONGEST_LINE >> 20} MiB{_ONE_PER_LINE}. Split the document, or leave out what is damaged"
        )
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        where = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise ConfigError(f"{_encoding_of(line)}not UTF-8 ({where})") from error
    except (ValueError, RecursionError) as error:
        if b"\0" in line:
            raise ConfigError(f"{_encoding_of(line)}not UTF-8 (it holds bytes that are 0)") from error
        raise ConfigError(f"not valid JSON ({error}){_ONE_PER_LINE if line.strip() in (b'[', b'{') else ''}") from error
    if not isinstance(record, dict):
        hint = _ONE_PER_LINE if isinstance(record, list) else ""
        raise ConfigError(f"{kind_named(record)}, not an object{hint}")
    return record


def values_of(record: dict[str, Any], keys: list[str]) -> list[Any]:
    """What a row holds under each key."""
    for key in keys:
        if key not in record:
            raise ConfigError(f"no key {key!r} (the line has {sorted(record)[:8]}; see --json-keys)")
    return [record[key] for key in keys]


def _encoding_of(line: bytes) -> str:
    """ "UTF-16, " where a file begins with that encoding's byte order mark, or has the zeros of its Latin letters."""
    if line.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # first: the former begins as UTF-16's does
        return "UTF-32, "
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16, "
    share = line.count(0) / len(line)  # of Latin letters 1/2 in UTF-16 and 3/4 in UTF-32
    return f"probably UTF-{32 if share > 0.6 else 16}, " if share > 0.2 else ""


def check_ids(value: Any, key: str, vocab_size: int) -> list[int]:
    """A list of token ids."""
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ConfigError(f"the value of {key!r} is not a list of token ids, which --token-ids expects")
    if value and not (min(value) >= 0 and max(value) < vocab_size):
        wrong = next(item for item in value if not 0 <= item < vocab_size)
        raise ConfigError(f"the value of {key!r} holds {wrong}, but the tokenizer's ids are 0 to {vocab_size - 1}")
    return value


def as_text(value: Any, key: str, chat: ChatTemplate | None) -> str:
    """Text as it is but for a byte order mark before it, which is of a file that it came from; or a rendered chat."""
    if isinstance(value, list):
        template, messages = _chat_of(value, key, chat)
        value = template(messages)
    if not isinstance(value, str):
        raise ConfigError(f"the value of {key!r} is {kind_named(value)}, not text")
    _check_text(value, key)
    return value.removeprefix(_MARK)


def as_marked_chat(value: list[Any], key: str, chat: ChatTemplate | None) -> MarkedText:
    """What `as_text` makes of a chat, and which of it is the assistant's."""
    template, messages = _chat_of(value, key, chat)
    marked = template.mark(messages)
    _check_text(marked.text, key)
    return marked.without_prefix(_MARK)


def _check_text(text: str, key: str) -> None:
    if not text.isascii() and _SURROGATE.search(text):
        raise ConfigError(f"the value of {key!r} has half of a surrogate pair, which is not text")


def _chat_of(value: list[Any], key: str, chat: ChatTemplate | None) -> tuple[ChatTemplate, list[dict[str, Any]]]:
    messages = read_chat(value, key)
    if chat is None:
        raise ConfigError(f"the value of {key!r} is a chat, and the tokenizer has no chat template to render it with")
    return chat, messages
