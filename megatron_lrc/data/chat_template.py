"""ChatTemplate: renders chats (lists of messages) to text, as a tokenizer's own template says."""

import functools
from dataclasses import dataclass
from typing import Any

from megatron_lrc.config import ConfigError


@functools.cache
def _load_once(path: str) -> Any:
    from megatron_lrc.data.directory_tokenizer import open_tokenizer

    return open_tokenizer(path)


@dataclass(frozen=True)
class ChatTemplate:
    """Renders chats (lists of messages) as the tokenizer's own template says. template: its Jinja source.

    The tokenizer of the directory is loaded again where the first chat is met: workers without chats stay light.
    """

    path: str
    template: str

    def __call__(self, messages: list[dict[str, Any]]) -> str:
        """The whole chat as text, special tokens spelled out. ConfigError if the template refuses it."""
        try:
            return _load_once(self.path).apply_chat_template(messages, chat_template=self.template, tokenize=False)
        except Exception as error:  # a template is a program: it may fail in any way, and raises what it likes
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"the tokenizer's chat template refuses it ({type(error).__name__}: {reason})") from error


def chat_template_of(path: str, tokenizer: Any) -> ChatTemplate | None:
    """The chat template of a transformers tokenizer that was loaded from `path`; None if it has none."""
    return ChatTemplate(path, tokenizer.chat_template) if isinstance(tokenizer.chat_template, str) else None
