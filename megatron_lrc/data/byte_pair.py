"""Hugging Face's byte-level BPE through tiktoken: the same ids, several times as fast, where that is proved.

`prove` looks at a tokenizer once, `BytePairEncode` at every text; whatever is not covered goes through the `tokenizers`
library as before. What the proof needs (issue 4):

Splits. Both libraries cut a text into pieces with a regular expression. Its patterns are known ones, built of character
classes (letters, numbers, white space), a few literal characters and greedy repetition, which mean the same in both
engines if both put a character into the same classes. Their Unicode tables may differ, so both engines are asked about
every character beyond ASCII that comes up, once.

Merges. tiktoken joins any two neighbours whose union is a token, the one with the lowest id first; `tokenizers` joins
the pairs of its list, the first in the list first. Let the list be ordered by the ids it makes, and let every token,
encoded alone by `tokenizers`' merges, give itself. Then both do the same to every piece. For suppose that they did so
far, and tiktoken now may join l and r to the token t. Nothing was joined across the ends of t, and what was joined
within was each time the first in order there, so l, r is a state that `tokenizers` meets when it encodes t alone; the
only way from there to t is that l, r is in its list. So both have the same candidates, one pair to a token, in the same
order. Tokens that do not give themselves never come about by merging and are left out; where `tokenizers` looks whole
pieces up first (`ignore_merges`), as tiktoken always does, they stay, if tiktoken's merges do not give them either.

A byte that is no token is left out of the text by `tokenizers`, and makes tiktoken fail: such texts are not covered.
Added tokens are found by an expression here: the longest of the leftmost, as there.
"""

import itertools
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_lrc.data.encoders import BackendEncode, Encode, spelled_bytes
from megatron_lrc.data.split_patterns import GPT2, GPT2_SINGLE_DIGITS, LLAMA3, QWEN2

_KNOWN_SPLITS = {QWEN2, LLAMA3}
# tiktoken is twice as fast at a pattern without look-ahead. GPT-2's keeps the last of several blanks before something
# else for that; cut there beforehand, a text needs no looking ahead. Blanks: \s of both engines.
_GPT2_OF_PIECES = GPT2.replace(r"|\s+(?!\S)", "")
_BLANK = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BEFORE_A_CUT = re.compile(rf"[{_BLANK}](?=[{_BLANK}][^{_BLANK}])")
_CLASSES = (r"\p{L}", r"\p{N}", r"\s", r"(?i:[strevmld])")

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
# tiktoken's engine overflows its stack on some hundred thousand. Looked for from the start of a run only: to look from
# each of its places would take time with the square of its length.
_LONG_BLANK = re.compile(r"(?<!\s)\s{50000}")
_MOST_EXCEPTIONS = 10000


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What `prove` found out about a tokenizer. added: None if added tokens have rules of their own."""

    ranks: dict[bytes, int]
    pattern: str
    added: dict[str, int] | None
    added_pattern: str
    is_normalized: bool  # to NFC, first


def fastest(encode: Encode) -> Encode:
    """An encoder that gives the same ids; another one only where that is proved."""
    proof = prove(encode.backend) if isinstance(encode, BackendEncode) else None
    return BytePairEncode(encode.backend, proof) if proof else encode  # type: ignore[attr-defined]


def prove(backend: Any) -> Proof | None:
    """Whether tiktoken can stand for a `tokenizers.Tokenizer`; None if it cannot, or that is not known."""
    description = json.loads(backend.to_str())
    normalizer, added = description["normalizer"], description["added_tokens"]
    if normalizer not in (None, {"type": "NFC"}) or backend.encode_special_tokens:
        return None
    if normalizer and not all(unicodedata.is_normalized("NFC", token["content"]) for token in added):
        return None
    pattern = _split_pattern(description["pre_tokenizer"])
    ranks = _ranks(description["model"], {token["content"] for token in added})
    if pattern is None or ranks is None:
        return None
    plain = all(
        not (token["lstrip"] or token["rstrip"] or token["single_word"])
        and token["normalized"] == added[0]["normalized"]
        for token in added
    ) and (normalizer is None or not any(token["normalized"] for token in added))
    contents = sorted((token["content"] for token in added), key=len, reverse=True)
    return Proof(
        ranks=ranks,
        pattern=pattern,
        added={token["content"]: token["id"] for token in added} if plain else None,
        added_pattern="|".join(map(re.escape, contents)),
        is_normalized=normalizer is not None,
    )


class BytePairEncode:
    """Encodes texts as the `tokenizers.Tokenizer` does. Pickled to workers, which need not prove anything again."""

    def __init__(self, backend: Any, proof: Proof):
        import tiktoken

        self._backend, self._proof = backend, proof
        self._is_cut = proof.pattern == GPT2
        pattern = _GPT2_OF_PIECES if self._is_cut else proof.pattern
        self._merges = tiktoken.Encoding("proved", pat_str=pattern, mergeable_ranks=proof.ranks, special_tokens={})
        missing = [byte for byte in range(256) if bytes([byte]) not in proof.ranks]
        controls = "".join(rf"\x{byte:02x}" for byte in missing if byte < 128)
        self._missing = re.compile(f"[{controls}]") if controls else None
        self._added = re.compile(f"({proof.added_pattern})") if proof.added_pattern else None
        self._characters = _Characters(set(missing))

    def __reduce__(self) -> tuple[Any, ...]:
        return BytePairEncode, (self._backend, self._proof)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens other than those that it spells out."""
        encoded = [self._encode(text) for text in texts]
        missing = [number for number, ids in enumerate(encoded) if ids is None]
        slow = self._backend.encode_batch_fast([texts[number] for number in missing], add_special_tokens=False)
        for number, encoding in zip(missing, slow, strict=True):
            encoded[number] = encoding.ids
        return encoded  # type: ignore[return-value]

    def _encode(self, text: str) -> list[int] | None:
        """None where the proof does not cover the text."""
        if self._missing and self._missing.search(text):
            return None
        if not text.isascii():
            characters = set(_NOT_ASCII.findall(text))
            if not self._characters.are_alike(characters):
                return None
            if self._proof.is_normalized and not _is_settled(text, characters):
                return None
        if len(text) > 100_000 and _LONG_BLANK.search(text):
            return None
        if self._added is None or not self._added.search(text):
            return self._merge(text)
        if self._proof.added is None:
            return None
        ids: list[int] = []
        for number, part in enumerate(self._added.split(text)):
            if number % 2:
                ids.append(self._proof.added[part])
            elif part:
                ids += self._merge(part)
        return ids

    def _merge(self, text: str) -> list[int]:
        if not self._is_cut:
            return self._merges.encode_ordinary(text)
        ids: list[int] = []
        cuts = [0, *(blank.end() for blank in _BEFORE_A_CUT.finditer(text)), len(text)]
        for start, end in itertools.pairwise(cuts):
            ids += self._merges.encode_ordinary(text[start:end])
        return ids


class _Characters:
    """Which characters both engines put into the same classes. Asks each engine once for each character.

    missing_bytes: a character with one of them is not alike.
    """

    def __init__(self, missing_bytes: set[int]):
        import tiktoken
        from tokenizers import Regex, pre_tokenizers

        single_bytes = {bytes([byte]): byte for byte in range(256)}
        self._questions = [
            (
                pre_tokenizers.Split(Regex(pattern), "removed"),
                tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={}),
            )
            for pattern in _CLASSES
        ]
        self._digits = pre_tokenizers.Digits(individual_digits=True)  # has a table of its own
        self._missing_bytes = missing_bytes
        self._alike: set[str] = set()

    def are_alike(self, characters: set[str]) -> bool:
        new = characters - self._alike
        self._alike |= {character for character in new if self._is_alike(character)}
        return characters <= self._alike

    def _is_alike(self, character: str) -> bool:
        if not self._missing_bytes.isdisjoint(character.encode()):
            return False
        theirs = [not split.pre_tokenize_str(character) for split, _ in self._questions]
        ours = [bool(encoding.encode_ordinary(character)) for _, encoding in self._questions]
        is_digit = len(self._digits.pre_tokenize_str(f"a{character}")) == 2
        return theirs == ours and is_digit == ours[_CLASSES.index(r"\p{N}")]


def _is_settled(text: str, characters: Iterable[str]) -> bool:
    """NFC leaves the text as it is, in any version of Unicode that knows its characters."""
    return unicodedata.is_normalized("NFC", text) and all(unicodedata.category(each) != "Cn" for each in characters)


def _split_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern that cuts as the pre-tokenizer does, if it is a known one."""
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *before, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(before) > 1:
        return None
    if not before:
        return GPT2 if last["use_regex"] else None
    first = before[0]
    if first["type"] == "Digits" and first["individual_digits"] and last["use_regex"]:
        return GPT2_SINGLE_DIGITS
    is_known = first["type"] == "Split" and first["pattern"].get("Regex") in _KNOWN_SPLITS
    if is_known and first["behavior"] == "Isolated" and not first["invert"] and not last["use_regex"]:
        return first["pattern"]["Regex"]
    return None


def _ranks(model: dict[str, Any], added: set[str]) -> dict[bytes, int] | None:
    """Bytes -> id of the tokens that merging may give; None unless the module's argument holds for the merges."""
    from tokenizers import models

    affixes = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    if model["type"] != "BPE" or model["dropout"] or any(affixes):
        return None
    vocabulary: dict[str, int] = model["vocab"]
    merges = [tuple(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]]
    made = [vocabulary[left + right] for left, right in merges]
    if any(earlier > later for earlier, later in itertools.pairwise(made)):
        return None
    spelled = spelled_bytes()
    ranks = {
        bytes(spelled[character] for character in token): token_id
        for token, token_id in vocabulary.items()
        if token not in added and all(character in spelled for character in token)
    }
    alone = models.BPE(vocab=vocabulary, merges=merges)
    names = {token_id: token for token, token_id in vocabulary.items()}
    exceptions = [
        token
        for token, token_id in ranks.items()
        if len(token) > 1 and [piece.id for piece in alone.tokenize(names[token_id])] != [token_id]
    ]
    if not model.get("ignore_merges"):
        return {token: token_id for token, token_id in ranks.items() if token not in set(exceptions)}
    if len(exceptions) > _MOST_EXCEPTIONS or any(_merges_to_itself(token, ranks) for token in exceptions):
        return None
    return ranks


def _merges_to_itself(token: bytes, ranks: dict[bytes, int]) -> bool:
    """Whether tiktoken's merges, without its look-up of whole pieces, give the token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 1:
        pairs = [ranks.get(left + right) for left, right in itertools.pairwise(parts)]
        candidates = [rank for rank in pairs if rank is not None]
        if not candidates:
            return False
        place = pairs.index(min(candidates))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return True
