"""Chats as data files hold them: lists of messages, checked before a template sees them.

Two forms are read: {"role": "user", "content": ...} as chat templates take it, and {"from": "human", "value": ...} as
ShareGPT and OpenHermes-2.5 have it. A template prints what it is given, also a number, or None: whatever is not text
is refused here, or is no text.
"""

from typing import Any, Literal

from megatron_lrc.config import ConfigError
from megatron_lrc.data.chat_template import Content
from megatron_lrc.data.json_kinds import kind_named

#: The role that stands for a speaker in ShareGPT's form. Whoever prepares such data also writes the roles themselves.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    **{role: role for role in ("system", "user", "assistant", "tool")},
}


def read_chat(messages: list[Any], key: str) -> list[dict[str, Any]]:
    """Messages that have a role (a string), a content (`Content`) and, in the first form, whatever else was not null.

    The message of a ConfigError completes "FILE:LINE: ".
    """
    forms = {_form_of(message) for message in messages}
    if None in forms:
        raise ConfigError(
            f'the value of {key!r} is a list, but not of messages such as {{"role": ..., "content": ...}} or '
            '{"from": ..., "value": ...} (for a list of token ids add --token-ids)'
        )
    if len(forms) > 1:
        raise ConfigError(f"the messages of {key!r} are of two forms: some have a role, others a from. One is expected")
    read = _read_turn if forms == {"from"} else _read_message
    return [read(message, f"message {number} of {key!r}") for number, message in enumerate(messages, start=1)]


def _form_of(message: Any) -> Literal["role", "from"] | None:
    """By the key that says who speaks. A table of both forms has both columns, one of them null."""
    if not isinstance(message, dict):
        return None
    if message.get("from") is not None and message.get("role") is None:
        return "from"
    return "role" if "role" in message else None


def _read_turn(message: dict[str, Any], name: str) -> dict[str, Any]:
    """A message of the second form as one of the first. Its other fields, such as OpenHermes' weight, are left out."""
    speaker = message["from"]
    if not isinstance(speaker, str):
        raise ConfigError(f"{name} is from {kind_named(speaker)}, which is no name of a speaker")
    if speaker not in _ROLES:
        raise ConfigError(f"{name} is from {speaker!r}; who speaks is expected to be one of {', '.join(_ROLES)}")
    if "value" not in message:
        raise ConfigError(f"{name} has no value, only {', '.join(sorted(message))}")
    return {"role": _ROLES[speaker], "content": _read_content({"content": message["value"]}, name)}


def _read_message(message: dict[str, Any], name: str) -> dict[str, Any]:
    role, content = message["role"], _read_content(message, name)
    if not isinstance(role, str):
        raise ConfigError(f"{name} has {kind_named(role)} as its role, which is not text")
    return {**_without_null(message), "content": content}


def _read_content(message: dict[str, Any], name: str) -> Content:
    """Null is no text. So is no content at all beside a call of a tool; elsewhere the text may be under another key."""
    content = message.get("content", None if _calls_tool(message) else ...)
    if content is ...:
        raise ConfigError(f"{name} has no content, only {', '.join(sorted(message))}")
    if content is None:
        return ""
    if isinstance(content, list):
        return [_read_part(part, name) for part in content]
    if not isinstance(content, str):
        raise ConfigError(f"{name} has {kind_named(content)} as its content, which is not text")
    return content


def _read_part(part: Any, name: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise ConfigError(f"{name} has {kind_named(part)} among the parts of its content, not an object")
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ConfigError(
            f'{name} has content of type {part.get("type")!r}; {{"type": "text", "text": "..."}} is expected, since '
            "only text can be rendered"
        )
    return _without_null(part)


def _calls_tool(message: dict[str, Any]) -> bool:
    return bool(message.get("tool_calls") or message.get("function_call"))


def _without_null(values: dict[str, Any]) -> dict[str, Any]:
    """Tables have every field in every row, and a template may print one that is null as the word None."""
    return {name: value for name, value in values.items() if value is not None}
