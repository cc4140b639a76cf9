r"""Tokenizers that are a file of byte sequences and their ranks, encoded by tiktoken (`--tokenizer-type TikTokenizer`).

Two forms of file, told apart by their first character. Which ids special tokens get follows from the form:

* a rank file in tiktoken's own format, a line "BASE64 RANK" per token, such as Llama 3's original tokenizer.model.
  Ids are ranks; special tokens come after them, in the order given;
* Megatron-LM's JSON list of {"rank", "token_bytes", "token_str"}. Special tokens come first, 1000 of them unless
  said otherwise, and ids are ranks + that number.

Neither form holds the split pattern, the special tokens or their roles, so flags say them. Spellings of special tokens
in a text become their ids, as with a Hugging Face tokenizer of the same model: which file is named does not matter, as
long as both give known texts the same ids (`are_alike`). Text is not normalised. Nothing is downloaded: tiktoken's
encodings by name are not offered.
"""

import base64
import itertools
import os
from dataclasses import dataclass
from typing import Any

from megatron_lrc.config import ConfigError
from megatron_lrc.data.encoders import spelled_bytes
from megatron_lrc.data.loaded_tokenizer import Tokenizer
from megatron_lrc.data.split_patterns import LLAMA3, MEGATRON_V1, TEKKEN
from megatron_lrc.json_files import parse_json

PATTERNS = {"v1": MEGATRON_V1, "v2": TEKKEN, "llama3": LLAMA3}  # v1 and v2 are Megatron-LM's names
# Megatron-LM's, in its order
JSON_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
JSON_NUM_SPECIAL_TOKENS = 1000
_ROLES = {"bos": ("<s>", "<|begin_of_text|>"), "eos": ("</s>", "<|end_of_text|>"), "unk": ("<unk>",)}


@dataclass(frozen=True, kw_only=True)
class TiktokenOptions:
    """What a rank file does not say. The flags of tools/preprocess_data.py have the same names."""

    pattern: str | None = None  # a name in PATTERNS, or a regular expression
    num_special_tokens: int | None = None  # those not named are called <SPECIAL_i>, as in Megatron-LM
    special_tokens: list[str] | None = None
    bos_token: str | None = None  # a special token; without it <s> or <|begin_of_text|>, if there is one
    eos_token: str | None = None  # likewise </s> or <|end_of_text|>
    vocab_size: int | None = None  # special tokens included: later ranks are cut off


@dataclass(frozen=True)
class TiktokenEncode:
    """Encodes one text at a time in this thread. tiktoken pickles an encoding as its tables."""

    encoding: Any

    def __call__(self, texts: list[str]) -> list[list[int]]:
        special_tokens = self.encoding.special_tokens_set
        try:
            return [self.encoding.encode(text, allowed_special=special_tokens, disallowed_special=()) for text in texts]
        except ValueError as error:
            raise ConfigError(
                f"tiktoken cannot split a text, the longest of whose batch has {max(map(len, texts)):,} characters "
                f"({error}). Runs of some 700,000 blanks are too much for it: take them out, or give --tokenizer-model "
                "the Hugging Face directory of the same tokenizer."
            ) from error


def load_tiktoken(path: str, options: TiktokenOptions) -> Tokenizer:
    """The tokenizer of a rank file or of Megatron-LM's JSON. ConfigError if file and options do not make one."""
    pattern = _find_pattern(options.pattern)
    ranks, specials = _place(path, *_read_file(path), options)
    given = {"bos": options.bos_token, "eos": options.eos_token, "unk": None}
    roles = {role: _find_role(role, specials, token) for role, token in given.items()}
    vocabulary = {**{_spell(token): token_id for token, token_id in ranks.items()}, **specials}
    return Tokenizer.identified(
        kind="tiktoken",
        vocabulary=vocabulary,
        roles=roles,
        rules=pattern,
        encode_batch=TiktokenEncode(_make_encoding(pattern, ranks, specials)),
        vocab_size=len(ranks) + len(specials),
        eod=specials[roles["eos"]] if roles["eos"] else None,
        bos=specials[roles["bos"]] if roles["bos"] else None,
        path=path,
    )


def _make_encoding(pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> Any:
    import regex
    import tiktoken

    try:
        pieces = [match.group() for match in regex.finditer(pattern, _every_kind_of_character())]
        encoding = tiktoken.Encoding("file", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    except (ValueError, regex.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--tiktoken-pattern {pattern!r} is no regular expression ({reason}). Give one, or a name: "
            f"{', '.join(PATTERNS)}."
        ) from error
    # tiktoken drops what no match covers, and panics at an empty match.
    if not all(pieces) or "".join(pieces) != _every_kind_of_character():
        raise ConfigError(
            f"--tiktoken-pattern {pattern!r} leaves out some characters or matches nothing at all at some place, and "
            r"such text would be lost. End the pattern with |\s+|\S, or give a name: " + f"{', '.join(PATTERNS)}."
        )
    return encoding


def _every_kind_of_character() -> str:
    """Controls, blanks, letters with and without case, marks, digits, punctuation; side by side, then apart."""
    characters = [chr(code) for code in (*range(0x600), *range(0x900, 0xA00), *range(0x2000, 0x2100), 0x4E2D, 0x1F600)]
    return "".join(characters) + " ".join(characters) + "\n".join(characters)


def _find_pattern(pattern: str | None) -> str:
    if pattern is None:
        raise ConfigError(
            "--tokenizer-type TikTokenizer needs --tiktoken-pattern, since no rank file says how text is split. Give "
            f"the one that the tokenizer was made with: {', '.join(PATTERNS)}, or a regular expression."
        )
    if pattern.isalnum() and pattern not in PATTERNS:
        raise ConfigError(
            f"There is no tiktoken pattern {pattern!r}. Give --tiktoken-pattern {', '.join(PATTERNS)}, or a regular "
            "expression."
        )
    return PATTERNS.get(pattern, pattern)


def _place(
    path: str, tokens: list[bytes], is_json: bool, options: TiktokenOptions
) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ids of the tokens (given in the order of their ranks) and of the special tokens."""
    named = options.special_tokens if options.special_tokens is not None else JSON_SPECIAL_TOKENS if is_json else ()
    number = options.num_special_tokens
    if number is None:
        number = JSON_NUM_SPECIAL_TOKENS if is_json else len(named)
    if len(named) > number:
        raise ConfigError(
            f"There are {len(named)} --tiktoken-special-tokens, but --tiktoken-num-special-tokens is {number}. It is "
            "the number of all special tokens: raise it."
        )
    if options.vocab_size is not None:
        if not 0 < options.vocab_size - number <= len(tokens):
            raise ConfigError(
                f"--vocab-size {options.vocab_size} is not within what {path!r} can make: {number} special tokens and "
                f"1 to {len(tokens)} others. Leave it out to take all."
            )
        tokens = tokens[: options.vocab_size - number]
    _check_bytes(path, tokens)
    names = [*named, *(f"<SPECIAL_{index}>" for index in range(len(named), number))]
    _check_special_tokens(names)
    first, first_special = (number, 0) if is_json else (0, len(tokens))
    return (
        {token: first + rank for rank, token in enumerate(tokens)},
        {name: first_special + index for index, name in enumerate(names)},
    )


def _check_bytes(path: str, tokens: list[bytes]) -> None:
    lacking = {bytes([byte]) for byte in range(256)} - set(tokens)
    if lacking:
        raise ConfigError(
            f"{path!r} has no token for the byte 0x{min(lacking).hex()} ({len(lacking)} of 256 are lacking), so it "
            "could not encode every text. Give --tokenizer-model a complete rank file, and no --vocab-size below its."
        )


def _check_special_tokens(names: list[str]) -> None:
    """No name may begin another: tiktoken would find either, by chance."""
    if "" in names:
        raise ConfigError("One of --tiktoken-special-tokens is empty. Give each its spelling.")
    for name, following in itertools.pairwise(sorted(names)):
        if following.startswith(name):
            how = (
                "is given twice" if following == name else f"begins {following!r}, and either could be found in a text"
            )
            raise ConfigError(f"The special token {name!r} {how}. Give other --tiktoken-special-tokens.")


def _find_role(role: str, specials: dict[str, int], given: str | None) -> str | None:
    if given is None:
        return next((name for name in _ROLES[role] if name in specials), None)
    if given not in specials:
        raise ConfigError(
            f"--tiktoken-{role}-token {given!r} is not among the {len(specials)} special tokens. Name it in "
            "--tiktoken-special-tokens, at the place that gives it its id."
        )
    return given


def _read_file(path: str) -> tuple[list[bytes], bool]:
    """Tokens in the order of their ranks, and whether the file is Megatron-LM's JSON."""
    if not os.path.isfile(path):
        raise ConfigError(
            f"There is no rank file {path!r}. Give --tokenizer-model a file in tiktoken's format or Megatron-LM's JSON."
        )
    with open(path, "rb") as file:
        content = file.read()
    is_json = content.lstrip().startswith(b"[")
    entries = _read_json(path, content) if is_json else _read_lines(path, content)
    by_rank: dict[int, bytes] = {}
    ranks: dict[bytes, int] = {}
    for token, rank in entries:
        if rank in by_rank or token in ranks:
            twice = f"the rank {rank}" if rank in by_rank else f"the token {token!r}"
            raise ConfigError(f"{path!r} has {twice} twice. Every token needs one rank of its own: get the file again.")
        by_rank[rank], ranks[token] = token, rank
    lacking = set(range(len(by_rank))) - set(by_rank)
    if lacking or not by_rank:
        raise ConfigError(
            f"{path!r} has {len(by_rank)} tokens, but none of rank {min(lacking, default=0)}. Ranks go from 0 on "
            "without a gap: get the file again."
        )
    return [by_rank[rank] for rank in range(len(by_rank))], is_json


def _read_lines(path: str, content: bytes) -> list[tuple[bytes, int]]:
    entries: list[tuple[bytes, int]] = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            entries.append(_make_entry(token, int(rank)))
        except ValueError as error:
            raise ConfigError(
                f"{path}:{number} is not a token in base64 and its rank, so this is no rank file of tiktoken's. A "
                "SentencePiece model or a directory needs another --tokenizer-type."
            ) from error
    return entries


def _read_json(path: str, content: bytes) -> list[tuple[bytes, int]]:
    entries: list[tuple[bytes, int]] = []
    try:
        for entry in parse_json(content):
            entries.append(_make_entry(entry["token_bytes"], entry["rank"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f'Entry {len(entries)} of {path!r} is not {{"rank": ..., "token_bytes": BASE64, "token_str": ...}}, so it '
            "is not Megatron-LM's JSON vocabulary. Give --tokenizer-model such a file, or one in tiktoken's format."
        ) from error
    return entries


def _make_entry(spelled: str | bytes, rank: Any) -> tuple[bytes, int]:
    """ValueError if it is no base64 of at least a byte, or no rank."""
    token = base64.b64decode(spelled, validate=True)
    if not token or not isinstance(rank, int) or rank < 0:
        raise ValueError(f"{token!r} {rank!r}")
    return token, rank


_SPELLING = {byte: character for character, byte in spelled_bytes().items()}


def _spell(token: bytes) -> str:
    """A token as Hugging Face vocabularies spell it."""
    return "".join(_SPELLING[byte] for byte in token)
