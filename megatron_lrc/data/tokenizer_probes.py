"""Texts on which tokenizers of one vocabulary are known to differ, and the first on which two of them do.

Two tokenizers may share every token and still cut text otherwise: at blanks that open a text, after a special
token, at digits, newlines, letters of other scripts. What two of them make of these texts is what tells them apart
where their files cannot be compared (a SentencePiece model and a tokenizer.json, a file and what a library made of
it).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_lrc.data.encoders import Encode

PLAIN_TEXTS: tuple[str, ...] = (
    "The quick brown fox jumps over the lazy dog.",
    " one blank before",
    "  two blanks before",
    "    four blanks, as code has them",
    "\tA tab first,\tthen another",
    "blanks behind   ",
    "many          blanks     within",
    "\n",
    "\n\n\n\nLines,\n\n  an indent\r\nand Windows' end\r\n\r\n",
    "   \n   \n",
    "In 2023, 7 of 1234567 cost 3.14159 or 1,000,000.50",
    "v2.10.3-rc1 0x7fFF 1e-05 10% $5 #6",
    "\u0663\u0664\u0665 and \u0967\u0968\u0969, \u00bd of \u00b2",
    "I'll say they've DON'T, we'RE and it's; O'Neil's",
    "camelCaseName SCREAMING_SNAKE_CASE kebab-case XMLHttpRequest",
    "def f(x, *args):\n    if x == 1:\n        return {'a': [x ** 2]}\n\n    # done\n",
    "for (int i=0;i<n;++i){a[i]+=b[i]>>2;}//!=&&||",
    '<a href="https://example.org/?q=1&r=%20">mail@example.org</a>',
    "!!!???...---***___///\\\\\\((()))[[]]{{}}",
    "[INST] a prompt [/INST]",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u5427\u3002",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \u3067\u3059\u3002",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc785\ub2c8\ub2e4.",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0393\u03b5\u03b9\u03ac",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "caf\u00e9 and cafe\u0301, \u00c5 and A\u030a and \u212b",  # composed, decomposed, compatible
    "\ufb01ne \uff21\uff22\uff23 \u2460 \u00aa",
    "a\u00a0b\u2009c\u3000d\u200be\u2028f\ufeffg",  # blanks beyond ASCII
    "\U0001f642 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\u2014\u2018quotes\u2019 \u201cand\u201d \u2026 \u2581 \u0120",
    "bell\x07, null\x00, delete\x7f",
    "a" * 70 + " " + "ab" * 40,
    "\u00e6\u00f8\u00e5\u00df\u0131\u0130 \u01c5 \u02b0",
)


def with_special_tokens(tokens: Iterable[str]) -> list[str]:
    """Texts that spell these special tokens out: at the start, behind a blank, before a word, a blank, a line's end."""
    shapes = ("{0}", "{0}word", "{0} word", "word{0}word", "word {0} 12\n", "{0}\n\nword{0}{0}  word")
    return [shape.format(token) for token in tokens for shape in shapes]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two tokenizers' ids of the same texts. str() completes a sentence that begins "the one"."""

    text: str
    ids: Sequence[int]
    other_ids: Sequence[int]
    num_different: int
    num_texts: int

    def __str__(self) -> str:
        return (
            f"{self.num_different} of {self.num_texts} test texts get other ids, the first being {self.text[:60]!r}: "
            f"{_shortened(self.ids)} and {_shortened(self.other_ids)}"
        )


def find_difference(encode: Encode, other: Encode, texts: Sequence[str]) -> Difference | None:
    """None if both give the same ids for all texts."""
    pairs = list(zip(texts, encode(list(texts)), other(list(texts)), strict=True))
    different = [(text, ids, other_ids) for text, ids, other_ids in pairs if list(ids) != list(other_ids)]
    if not different:
        return None
    text, ids, other_ids = different[0]
    return Difference(text=text, ids=ids, other_ids=other_ids, num_different=len(different), num_texts=len(texts))


def digest_of_ids(encode: Encode, special_tokens: Iterable[str]) -> str:
    """SHA-256 over the ids of all these texts."""
    ids = encode([*PLAIN_TEXTS, *with_special_tokens(special_tokens)])
    return hashlib.sha256(json.dumps([list(map(int, one)) for one in ids]).encode()).hexdigest()


def _shortened(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:8]))
    return f"[{shown}{', ...' if len(ids) > 8 else ''}]"
