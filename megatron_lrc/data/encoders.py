"""How a list of texts becomes lists of ids, and the alphabet in which byte-level vocabularies spell bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class BackendEncode:
    """Encodes through a `tokenizers.Tokenizer` directly: unpickling it in a worker needs no transformers."""

    backend: Any

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]


def spelled_bytes() -> dict[str, int]:
    """Character -> byte in GPT-2's spelling: printable Latin-1 bytes are themselves, others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}
