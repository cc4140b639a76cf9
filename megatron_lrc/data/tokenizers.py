"""Tokenizers behind one small class: what data preparation, the data checks and megatron-core's datasets need.

A tokenizer is identified by what its ids mean: `fingerprint` is a SHA-256 over the vocabulary and the bos, eos and unk
tokens, so a copied directory is the same tokenizer, and a SentencePiece model and a plain Hugging Face conversion of it
agree. The pad token is left out: conversions add one at will, and no prepared text contains it.

There is deliberately no `pad` attribute. megatron-core's GPTDataset would otherwise mask every label that equals it and
overwrite such tokens with id 0; the datasets here are never padded.

torch is not imported, transformers and sentencepiece only inside the loaders, so that `--help` answers at once and the
worker processes of tools/preprocess_data.py start with the `tokenizers` library alone.
"""

import functools
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_lrc.config import ConfigError

if TYPE_CHECKING:
    from megatron_lrc.data.tiktoken_files import TiktokenOptions

TokenizerType = Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer"]
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
    chat: "ChatTemplate | None" = None
    encoding_identity: str = ""  # what decides a text's ids beside the fingerprint, as far as flags can change it


def load_tokenizer(
    path: str, tokenizer_type: TokenizerType | None = None, tiktoken: "TiktokenOptions | None" = None
) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, a SentencePiece model file or a rank file.

    `path` shows which of the first two it is if it is not said. tiktoken: for a rank file only, what it lacks.
    """
    from megatron_lrc.data.tiktoken_files import TiktokenOptions, load_tiktoken

    tiktoken = tiktoken or TiktokenOptions()
    if tokenizer_type == "TikTokenizer":
        return load_tiktoken(path, tiktoken)
    if tiktoken != TiktokenOptions():
        raise ConfigError(
            "Flags that begin with --tiktoken, and --vocab-size, are for --tokenizer-type TikTokenizer. Leave them out."
        )
    if tokenizer_type is None:
        tokenizer_type = "SentencePieceTokenizer" if os.path.isfile(path) else "HuggingFaceTokenizer"
    if tokenizer_type == "SentencePieceTokenizer":
        return _load_sentencepiece(path)
    return _load_hugging_face(path)


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


@functools.cache
def _load_once(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


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


@dataclass(frozen=True)
class BackendEncode:
    """Encodes through a `tokenizers.Tokenizer` directly: unpickling it in a worker needs no transformers."""

    backend: Any

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]


@dataclass(frozen=True)
class _PythonEncode:
    """Encodes through a transformers tokenizer that has no fast backend."""

    tokenizer: Any

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class _SentencePieceEncode:
    processor: Any

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return self.processor.encode(texts, out_type=int, add_bos=False, add_eos=False, num_threads=1)


def _load_hugging_face(path: str) -> Tokenizer:
    if not os.path.isdir(path):
        raise ConfigError(
            f"There is no tokenizer directory {path!r}. A local directory with tokenizer.json or tokenizer.model is "
            "needed (nothing is downloaded): give --tokenizer-model such a directory."
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"transformers finds no tokenizer that it can load in {path!r} ({reason}). Give --tokenizer-model a "
            "directory that holds one, or a SentencePiece .model file."
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # What tokenizer.json says about truncation and padding is meant for model calls: documents are kept whole.
        backend.no_truncation()
        backend.no_padding()
    vocabulary = tokenizer.get_vocab()
    special_tokens = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token, "unk": tokenizer.unk_token}
    return Tokenizer(
        fingerprint=fingerprint(vocabulary, special_tokens),
        vocab_size=max(vocabulary.values()) + 1,
        eod=tokenizer.eos_token_id,
        bos=tokenizer.bos_token_id,
        chat=ChatTemplate(path, tokenizer.chat_template) if isinstance(tokenizer.chat_template, str) else None,
        path=path,
        encode_batch=_PythonEncode(tokenizer) if backend is None else BackendEncode(backend),
    )


def _load_sentencepiece(path: str) -> Tokenizer:
    if not os.path.isfile(path):
        raise ConfigError(
            f"There is no SentencePiece model file {path!r}. Give --tokenizer-model the path of a .model file."
        )
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.load(path)
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"{path!r} is not a SentencePiece model. Give --tokenizer-model a .model file, or a Hugging Face tokenizer "
            "directory with --tokenizer-type HuggingFaceTokenizer."
        ) from error
    vocabulary = {processor.id_to_piece(piece_id): piece_id for piece_id in range(processor.get_piece_size())}
    roles = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id()}
    special_tokens = {role: processor.id_to_piece(role_id) if role_id >= 0 else None for role, role_id in roles.items()}
    return Tokenizer(
        fingerprint=fingerprint(vocabulary, special_tokens),
        vocab_size=processor.get_piece_size(),
        eod=processor.eos_id() if processor.eos_id() >= 0 else None,
        bos=processor.bos_id() if processor.bos_id() >= 0 else None,
        path=path,
        encode_batch=_SentencePieceEncode(processor),
    )
