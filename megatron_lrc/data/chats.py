"""Chats as data files hold them: lists of messages, checked before a template sees them.

A template prints what it is given, also a number, or None: whatever is not text is refused here, or is no text.
"""

from typing import Any

from megatron_lrc.config import ConfigError
from megatron_lrc.data.chat_template import Content


def read_chat(messages: list[Any], key: str) -> list[dict[str, Any]]:
    """Messages that have a role (a string), a content (`Content`) and whatever else was not null.

    The message of a ConfigError completes "FILE:LINE: ".
    """
    if not all(isinstance(message, dict) and "role" in message for message in messages):
        raise ConfigError(
            f'the value of {key!r} is a list, but not of messages such as {{"role": ..., "content": ...}} (for a list '
            "of token ids add --token-ids)"
        )
    return [_read_message(message, f"message {number} of {key!r}") for number, message in enumerate(messages, start=1)]


def _read_message(message: dict[str, Any], name: str) -> dict[str, Any]:
    role, content = message["role"], _read_content(message, name)
    if not isinstance(role, str):
        raise ConfigError(f"{name} has a {type(role).__name__} as its role, which is not text")
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
        raise ConfigError(f"{name} has a {type(content).__name__} as its content, which is not text")
    return content


def _read_part(part: Any, name: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise ConfigError(f"{name} has a {type(part).__name__} among the parts of its content, not an object")
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
