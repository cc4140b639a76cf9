"""Runs of words, by which paragraphs that say the same are found although they are not equal."""

import re

SHINGLE_WORDS = 8
MAX_SHARED_SHINGLES = 0.2  # of a paragraph's runs of words: with more it counts as a repetition


def shingles(paragraph: str) -> set[int]:
    """Hashes of every run of SHINGLE_WORDS words, blind to case and punctuation. They hold in this process only."""
    words = re.findall(r"[a-z0-9]+", paragraph.lower())
    return {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def is_repetition(own: set[int], seen: set[int]) -> bool:
    """Whether a paragraph with these shingles largely occurs in what was seen."""
    return len(own & seen) > MAX_SHARED_SHINGLES * len(own)
