"""Loads tokenizers: Hugging Face directories and SentencePiece models here, rank files in `tiktoken_files.py`.

transformers and sentencepiece are imported inside the loaders and torch not at all: `--help` answers at once,
and worker processes start with the `tokenizers` library alone.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from megatron_lrc.config import ConfigError
from megatron_lrc.data.chat_template import chat_template_of
from megatron_lrc.data.directory_tokenizer import open_tokenizer, rules_of
from megatron_lrc.data.encoders import BackendEncode
from megatron_lrc.data.loaded_tokenizer import Tokenizer
from megatron_lrc.data.tiktoken_files import TiktokenOptions, load_tiktoken

TokenizerType = Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer"]


def load_tokenizer(
    path: str, tokenizer_type: TokenizerType | None = None, tiktoken: TiktokenOptions | None = None
) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, a SentencePiece model file or a rank file.

    `path` shows which of the first two it is if it is not said. tiktoken: for a rank file only, what it lacks.
    """
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


@dataclass(frozen=True)
class _PythonEncode:
    """Encodes through a transformers tokenizer that has no fast backend."""

    tokenizer: Any

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]


def _load_hugging_face(path: str) -> Tokenizer:
    tokenizer = open_tokenizer(path)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab()
    return Tokenizer.identified(
        kind="python" if backend is None else "tokenizers",
        vocabulary=vocabulary,
        roles={"bos": tokenizer.bos_token, "eos": tokenizer.eos_token, "unk": tokenizer.unk_token},
        rules=type(tokenizer).__name__ if backend is None else rules_of(backend),
        encode_batch=_PythonEncode(tokenizer) if backend is None else BackendEncode(backend),
        vocab_size=max(vocabulary.values()) + 1,
        eod=tokenizer.eos_token_id,
        bos=tokenizer.bos_token_id,
        chat=chat_template_of(path, tokenizer),
        path=path,
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
    return Tokenizer.identified(
        kind="sentencepiece",
        vocabulary=vocabulary,
        roles={role: processor.id_to_piece(role_id) if role_id >= 0 else None for role, role_id in roles.items()},
        rules=hashlib.sha256(processor.serialized_model_proto()).hexdigest(),
        encode_batch=partial(processor.encode, out_type=int, add_bos=False, add_eos=False, num_threads=1),
        vocab_size=processor.get_piece_size(),
        eod=roles["eos"] if roles["eos"] >= 0 else None,
        bos=roles["bos"] if roles["bos"] >= 0 else None,
        path=path,
    )
