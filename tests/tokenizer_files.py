"""Writes small tokenizers of the kinds that libraries treat differently: Llama 2's, byte-level, SentencePiece's."""

import functools
import json
import shutil
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_lrc.data.tokenizer_probes import PLAIN_TEXTS

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
#: A pattern that no class of transformers has: numbers of up to four digits.
OWN_PATTERN = r"\p{N}{1,4}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"


@functools.cache
def llama2_style() -> Tokenizer:
    """SentencePiece BPE as in Llama 2's tokenizer.json: blanks by the normalizer, no pre-tokenizer, BOS added."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    blanks = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), blanks])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    special = [*SPECIAL_TOKENS, *alphabet]
    tokenizer.train_from_iterator(PLAIN_TEXTS, trainers.BpeTrainer(vocab_size=700, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@functools.cache
def byte_level(pattern: str = OWN_PATTERN) -> Tokenizer:
    """Byte-level BPE whose pieces are this pattern's."""
    tokenizer = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(PLAIN_TEXTS, trainer)
    return tokenizer


def write_directory(directory: Path, tokenizer: Tokenizer, *, label: str, model_type: str, **config) -> Path:
    """tokenizer.json, tokenizer_config.json with this tokenizer_class, and config.json with this model_type."""
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    roles = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": label, **roles, **config}))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return directory


def write_sentencepiece(directory: Path) -> Path:
    """A SentencePiece BPE model that treats text as Llama 2's does: no normalisation, all blanks kept, bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    text = directory / "text.txt"
    text.write_text("\n".join(line for part in PLAIN_TEXTS for line in part.replace("\0", "").splitlines()) * 3)
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        split_digits=True,
        minloglevel=2,
    )
    text.unlink()
    (directory / "tokenizer.vocab").unlink()
    return directory / "tokenizer.model"


def write_model_directory(directory: Path) -> Path:
    """A Hugging Face directory of Llama's that holds tokenizer.model and no tokenizer.json."""
    write_sentencepiece(directory)
    roles = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **roles}))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def copy_with(source: Path, target: Path, **changes) -> Path:
    """A copy of a directory whose tokenizer.json has other values under these keys."""
    shutil.copytree(source, target)
    description = json.loads((target / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps({**description, **changes}))
    return target
