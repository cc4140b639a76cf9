"""Tokenizer: what data preparation, the data checks and megatron-core's datasets need of a loaded tokenizer.

It is identified by what its ids mean: `fingerprint` is a SHA-256 over the vocabulary and the bos, eos and unk tokens,
so a copied directory is the same tokenizer, and a SentencePiece model and a plain Hugging Face conversion of it agree.
The pad token is left out: conversions add one at will, and no prepared text contains it.

There is deliberately no `pad` attribute: megatron-core's GPTDataset would mask every label that equals it and
overwrite such tokens with id 0; the datasets here are never padded.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_lrc.data.chat_template import ChatTemplate

Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """What a tokenizer's ids mean. Enough for megatron-core's GPTDatasetConfig, and all that a manifest stores."""

    fingerprint: str
    vocab_size: int  # largest id + 1
    eod: int | None  # end-of-document id; None if the tokenizer has no EOS token

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """What megatron-core's dataset caches are keyed by. Holds no path: the cache survives a moved directory."""
        return OrderedDict(fingerprint=self.fingerprint, vocab_size=self.vocab_size, eod=self.eod)


@dataclass(frozen=True, kw_only=True)
class Tokenizer(TokenizerIdentity):
    """A loaded tokenizer. `encode_batch` adds no special tokens and never truncates. Can be pickled to a worker."""

    path: str
    encode_batch: Encode
    bos: int | None = None
    chat: ChatTemplate | None = None
    encoding_identity: str = ""  # what decides a text's ids beside the fingerprint, as far as flags can change it


def fingerprint(vocabulary: dict[str, int], special_tokens: dict[str, str | None]) -> str:
    """SHA-256 over the vocabulary in id order, then the special tokens by role ("bos", "eos", "unk")."""
    digest = hashlib.sha256()
    for token, token_id in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{token_id} {json.dumps(token)}\n".encode())
    for role, token in sorted(special_tokens.items()):
        digest.update(f"{role} {json.dumps(token)}\n".encode())
    return digest.hexdigest()


def spelled_bytes() -> dict[str, int]:
    """Character -> byte in GPT-2's spelling: printable Latin-1 bytes are themselves, others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


@dataclass(frozen=True)
class BackendEncode:
    """Encodes through a `tokenizers.Tokenizer` directly: unpickling it in a worker needs no transformers."""

    backend: Any

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
