r"""The regular expressions by which byte-level BPE tokenizers cut a text into pieces, each under its best-known name.

GPT2: GPT-2's own. LLAMA3: that of Meta's models since Llama 3. QWEN2: Qwen 2 and its successors, which differ in taking
digits one by one. TEKKEN: Mistral's tokenizers of that name; MEGATRON_V1: Megatron-LM's "v1" (its "v2" is TEKKEN).
"""

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_AFTER_NUMBERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NO_WORD = r"[^\r\n\p{L}\p{N}]"

GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
#: GPT-2's after digits were cut out one by one, so that white space before one is at the end of its piece.
GPT2_SINGLE_DIGITS = rf"{_CONTRACTIONS}| ?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+|\s+(?=\p{{N}})|\s+(?!\S)|\s+"
LLAMA3 = rf"(?i:{_CONTRACTIONS})|{_NO_WORD}?\p{{L}}+|\p{{N}}{{1,3}}{_AFTER_NUMBERS}"
QWEN2 = rf"(?i:{_CONTRACTIONS})|{_NO_WORD}?\p{{L}}+|\p{{N}}{_AFTER_NUMBERS}"
MEGATRON_V1 = rf"{_NO_WORD}?+\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
TEKKEN = (
    rf"{_NO_WORD}?{_UPPER}*{_LOWER}+|{_NO_WORD}?{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
