"""The tokenizer of a GGUF file, with the rules for text that the file only names.

A GGUF holds tokens, merges and scores; of how text is cut into pieces it holds a name (tokenizer.ggml.pre), the rest
is in llama.cpp. transformers knows some names and takes GPT-2's rules for others; here a name that is not known is
refused, since the result would give other ids than the model was trained with.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from megatron_lrc.config import ConfigError
from megatron_lrc.data import split_patterns
from megatron_lrc.data.directory_tokenizer import spell_as_sentencepiece
from megatron_lrc.data.pretrained import load_tokenizer_files


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a byte-level tokenizer treats text.

    pattern: of the pieces; None for GPT-2's. digits_apart: each digit is a piece of its own, first of all. nfc: text is
    normalised. whole_first: a piece that is a token stays whole, whatever merges say.
    """

    pattern: str | None = None
    digits_apart: bool = False
    nfc: bool = False
    whole_first: bool = False

    def apply_to(self, backend: Any) -> None:
        """Set them in a `tokenizers.Tokenizer` with a byte-level BPE model."""
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None)
        before: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits_apart else []
        if self.pattern is not None:
            before.append(pre_tokenizers.Split(Regex(self.pattern), "isolated"))
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before, by_bytes]) if before else by_bytes
        backend.normalizer = normalizers.NFC() if self.nfc else None
        backend.model.ignore_merges = self.whole_first


#: tokenizer.ggml.pre -> rules, for the names that models of the supported families carry.
RULES = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), Rules()),
    **dict.fromkeys(("smollm", "starcoder", "refact"), Rules(digits_apart=True)),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3"), Rules(pattern=split_patterns.LLAMA3, whole_first=True)
    ),
    "tekken": Rules(pattern=split_patterns.TEKKEN, whole_first=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Rules(pattern=split_patterns.QWEN2, nfc=True)),
}


def check_gguf_tokenizer(path: Path, contents: Any) -> None:
    """ConfigError unless a GGUF file says how its tokenizer treats text. contents: its open `GGUFReader`."""
    kind, pre = _field(contents, "model"), _field(contents, "pre")
    if kind not in ("gpt2", "llama"):
        raise ConfigError(
            f"{path} has a tokenizer of the kind {kind!r}; byte-level BPE (gpt2) and SentencePiece BPE (llama) are "
            "supported. Convert the model's original Hugging Face directory."
        )
    if kind == "gpt2" and pre not in RULES:
        said = f"names {pre!r}, which is not known here" if pre else "names none, as early files do"
        raise ConfigError(
            f"{path}: a GGUF file only names the rules by which its tokenizer splits text (tokenizer.ggml.pre), and "
            f"this one {said}, so the ids could be others than the model was trained with. Known: "
            f"{', '.join(sorted(RULES))}. Convert the model's original Hugging Face directory, or a newer GGUF of it."
        )


def read_gguf_tokenizer(path: Path, contents: Any) -> Any:
    """The transformers tokenizer of a GGUF file that lies alone in its folder and has passed the check."""
    tokenizer = load_tokenizer_files(AutoTokenizer, path.parent, gguf_file=path.name)
    if _field(contents, "model") == "gpt2":
        RULES[_field(contents, "pre")].apply_to(tokenizer.backend_tokenizer)
    else:
        adds_prefix = _field(contents, "add_space_prefix") is not False
        spell_as_sentencepiece(tokenizer.backend_tokenizer, adds_prefix=adds_prefix)
    return tokenizer


def _field(contents: Any, name: str) -> Any:
    field = contents.fields.get(f"tokenizer.ggml.{name}")
    return None if field is None else field.contents()
