"""Tokenizer: what data preparation, the data checks and megatron-core's datasets need of a loaded tokenizer.

It is identified by what its ids mean and by how a text becomes ids (`TokenizerIdentity`), never by its path: a copied
directory is the same tokenizer. Two forms of one tokenizer (a rank file and a tokenizer.json) are the same where they
give the same ids to the texts of `tokenizer_probes.py`. The pad token is left out: conversions add one at will, and no
prepared text contains it.

There is deliberately no `pad` attribute: megatron-core's GPTDataset would mask every label that equals it and
overwrite such tokens with id 0; the datasets here are never padded.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_lrc.data.chat_template import ChatTemplate
from megatron_lrc.data.encoders import Encode
from megatron_lrc.data.tokenizer_probes import PLAIN_TEXTS, digest_of_ids, find_difference

#: Who makes the ids: the library tokenizers, a SentencePiece model, tiktoken, or a Python class of transformers.
Kind = Literal["tokenizers", "sentencepiece", "tiktoken", "python"]


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """What a tokenizer's ids mean. Enough for megatron-core's GPTDatasetConfig, and all that a manifest stores.

    fingerprint: SHA-256 over the vocabulary, the bos, eos and unk tokens and every rule by which a text becomes ids.
    probes: SHA-256 over the vocabulary, these tokens, and the ids of known texts; "" where nobody asked for it.
    """

    fingerprint: str
    vocab_size: int  # largest id + 1
    eod: int | None  # end-of-document id; None if the tokenizer has no EOS token
    kind: Kind = "tokenizers"
    probes: str = ""

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """What megatron-core's dataset caches are keyed by. Holds no path: the cache survives a moved directory."""
        return OrderedDict(fingerprint=self.fingerprint, vocab_size=self.vocab_size, eod=self.eod)

    def as_manifest(self) -> dict[str, Any]:
        """What a manifest stores of it."""
        names = ("fingerprint", "probes", "kind", "vocab_size", "eod")
        return {name: getattr(self, name) for name in names}

    def made(self, manifest_entry: Mapping[str, Any]) -> bool:
        """Whether the tokenizer that a manifest names gives the ids that this one gives."""
        return are_alike(self.as_manifest(), manifest_entry)


def are_alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two tokenizers, as manifests name them, give the same ids.

    Of one kind they must have the same rules. Of two kinds, whose rules cannot be compared, they must give the known
    texts the same ids. A manifest of a version that did not record the rules is like none.
    """
    probes = [tokenizer.get("probes") for tokenizer in (first, second)]
    if all(probes) and probes[0] != probes[1]:
        return False
    is_other_kind = first.get("kind") != second.get("kind")
    return first["fingerprint"] == second["fingerprint"] or (all(probes) and is_other_kind)


def describe_unlike(made_with: Mapping[str, Any]) -> str:
    """A tokenizer that is not the expected one, for messages: what a manifest says of it."""
    text = f"{made_with.get('model')} ({made_with['vocab_size']} ids, fingerprint {made_with['fingerprint'][:12]}"
    return text + (")" if made_with.get("probes") else "; an earlier version wrote it, without how text is split)")


@dataclass(frozen=True, kw_only=True)
class Tokenizer(TokenizerIdentity):
    """A loaded tokenizer. `encode_batch` adds no special tokens and never truncates. Can be pickled to a worker."""

    path: str
    encode_batch: Encode
    bos: int | None = None
    chat: ChatTemplate | None = None

    def difference_from(self, other: "Tokenizer") -> str:
        """How another tokenizer that is not alike differs, for messages."""
        if self.vocab_size != other.vocab_size:
            return f"it has {other.vocab_size} ids instead of {self.vocab_size}"
        found = find_difference(self.encode_batch, other.encode_batch, PLAIN_TEXTS)
        return str(found) if found else "its tokens, its special tokens or its rules for text differ"

    @classmethod
    def identified(
        cls,
        *,
        kind: Kind,
        vocabulary: Mapping[str, int],
        roles: Mapping[str, str | None],
        rules: Any,
        encode_batch: Encode,
        **others: Any,
    ) -> "Tokenizer":
        """A tokenizer with its identity.

        roles: the tokens that are "bos", "eos", "unk". rules: how a text becomes ids, as JSON values, without the
        vocabulary.
        """
        meaning = _digest_of_meaning(vocabulary, roles)
        spelled = sorted({token for token in roles.values() if token})
        return cls(
            fingerprint=hashlib.sha256(f"{meaning} {kind} {json.dumps(rules, sort_keys=True)}".encode()).hexdigest(),
            probes=hashlib.sha256(f"{meaning} {digest_of_ids(encode_batch, spelled)}".encode()).hexdigest(),
            kind=kind,
            encode_batch=encode_batch,
            **others,
        )


def _digest_of_meaning(vocabulary: Mapping[str, int], roles: Mapping[str, str | None]) -> str:
    """SHA-256 over the vocabulary in id order, then the special tokens by role."""
    digest = hashlib.sha256()
    for token, token_id in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{token_id} {json.dumps(token)}\n".encode())
    for role, token in sorted(roles.items()):
        digest.update(f"{role} {json.dumps(token)}\n".encode())
    return digest.hexdigest()
