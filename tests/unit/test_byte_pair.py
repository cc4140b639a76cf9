"""tiktoken stands for a Hugging Face tokenizer only where the ids are the same, whatever the text."""

import functools
import json
import pickle
import time
from pydoc_data.topics import topics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_lrc.data.byte_pair import BytePairEncode, fastest, prove
from megatron_lrc.data.encoders import BackendEncode, spelled_bytes

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ["<|end|>", "<|endless|>", "<tool>"]
# Where expressions and Unicode tables are most likely to part: contractions, blanks of all kinds, digits of many
# scripts, marks, letters that case folding changes, unassigned code points, spellings of added tokens.
AWKWARD = st.text(
    st.sampled_from(
        "aZsStT'dlve019 \t\n\r\v\f\x1c\x1f\x85\xa0\u2028\u3000.,!_<|>²½Ⅷ٣߀éẞſK\u0301ﬆ中日ไ🙂"
        "\u200d\U0001f9d1\u0378\x04\x00\x7f"
    ),
    max_size=60,
)
PIECES = st.lists(
    st.sampled_from(
        [
            *SPECIAL_TOKENS,
            "don't",
            "DON'T",
            "'ſ",
            " 'll",
            "  ",
            "\n\n",
            " \n ",
            "123456",
            " 7",
            "a1",
            "x  9",
            "é",
            "e\u0301",
            "the ",
        ]
    ),
    max_size=20,
).map("".join)


def pre_tokenizer(kind: str) -> Any:
    byte_level = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
    split = functools.partial(pre_tokenizers.Split, behavior="isolated")
    return {
        "gpt2": lambda: byte_level(),
        "smollm2": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]),
        "llama3": lambda: pre_tokenizers.Sequence([split(Regex(LLAMA3)), byte_level(use_regex=False)]),
        "qwen2": lambda: pre_tokenizers.Sequence(
            [split(Regex(LLAMA3.replace("{1,3}", ""))), byte_level(use_regex=False)]
        ),
    }[kind]()


@functools.cache
def train(kind: str) -> Tokenizer:
    """A tokenizer of 2000 tokens whose text is split as the family of models does it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "smollm2":  # which lacks some bytes, as SmolLM2's own does
        alphabet = [spelling for spelling, byte in spelled_bytes().items() if byte not in (0x04, 0x16, 0xF1)]
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*topics.values(), "été 中日 ไทย 🙂 x²½ Ⅷ"], trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


@functools.cache
def both(kind: str) -> tuple[BytePairEncode, BackendEncode]:
    backend = train(kind)
    encode = fastest(BackendEncode(backend))
    assert isinstance(encode, BytePairEncode)
    return encode, BackendEncode(backend)


def rebuilt(tokenizer: Tokenizer, **changes: Any) -> Tokenizer:
    """A copy whose description has other top-level entries, or other ones in `model`."""
    description = json.loads(tokenizer.to_str())
    for name, value in changes.items():
        (description if name in description else description["model"])[name] = value
    return Tokenizer.from_str(json.dumps(description))


KINDS = ["gpt2", "smollm2", "llama3", "qwen2"]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(texts=st.lists(st.one_of(AWKWARD, PIECES, st.text(max_size=40)), min_size=1, max_size=4))
def test_awkward_texts_get_the_ids_of_the_hugging_face_tokenizer(kind: str, texts: list[str]) -> None:
    ours, theirs = both(kind)
    assert ours(texts) == theirs(texts)


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_is_covered_and_gets_the_same_ids(kind: str) -> None:
    ours, theirs = both(kind)
    texts = [*topics.values(), "Ça a été: 中日, ไทย — “quoted” 🙂", f"a{SPECIAL_TOKENS[0]} b {SPECIAL_TOKENS[1]}"]
    assert all(ours._encode(text) is not None for text in texts)
    assert ours(texts) == theirs(texts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_character_of_unicode_gets_the_same_ids(kind: str) -> None:
    ours, theirs = both(kind)
    characters = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x11000), *range(0x1F000, 0x1FC00))]
    texts = [
        f"a{character} 1{character}{character}'{character} {character} x\n{character}{character}y"
        for character in characters
    ]
    assert ours(texts) == theirs(texts)


def test_a_text_that_is_not_normalised_is_left_to_the_normalizer() -> None:
    ours, theirs = both("qwen2")
    assert ours._encode("e\u0301te\u0301") is None
    assert ours(["e\u0301te\u0301"]) == theirs(["été"])


def test_bytes_that_are_no_tokens_are_left_to_the_hugging_face_tokenizer() -> None:
    ours, theirs = both("smollm2")
    assert ours._encode("a\x04b") is None and ours._encode("a\U00050000b") is None
    assert ours(["a\x04b"]) == theirs(["a\x04b"])


def test_a_text_of_blanks_too_long_for_tiktoken_is_left_to_the_hugging_face_tokenizer() -> None:
    ours, theirs = both("gpt2")
    texts = [" " * 1_000_000 + "a", "\n" * 99_999]
    assert ours(texts) == theirs(texts)


@pytest.mark.parametrize("blank", [" ", "\n", "\u3000"])
def test_long_runs_of_blanks_take_no_more_time_than_short_ones(blank: str) -> None:
    """Of as many characters in all. Processor time, the least of three, so that a busy machine does not show."""
    ours, _ = both("llama3")

    def seconds(run: int) -> float:
        text, found = ("a" + blank * run) * (192_000 // run), []
        for _ in range(3):
            start = time.process_time()
            assert ours._encode(text) is not None
            found.append(time.process_time() - start)
        return min(found)

    assert seconds(48_000) < 4 * seconds(3_000)  # 16 times as long a run


def test_the_encoder_pickles_to_workers() -> None:
    ours, theirs = both("llama3")
    assert pickle.loads(pickle.dumps(ours))(["one <|end|> two"]) == theirs(["one <|end|> two"])


def small_merges(*, ignore_merges: bool) -> Tokenizer:
    """`abc` is a token, but merging gives b + c first and then has no pair for a + bc; tiktoken would join those."""
    spelled = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*spelled, "bc", "ab", "abc"])}
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer("gpt2")
    return tokenizer


def test_a_token_that_merging_never_gives_is_not_given_by_tiktoken_either() -> None:
    backend = small_merges(ignore_merges=False)
    proof = prove(backend)
    assert proof and b"abc" not in proof.ranks and b"ab" in proof.ranks
    texts = ["abc", "xabcx", "ab", "abcabc"]
    assert BytePairEncode(backend, proof)(texts) == BackendEncode(backend)(texts)
    assert len(BackendEncode(backend)(["abc"])[0]) == 2


def test_nothing_is_proved_where_tiktoken_would_join_what_the_list_of_merges_does_not() -> None:
    assert prove(small_merges(ignore_merges=True)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.1},
        {"end_of_word_suffix": "</w>"},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
    ],
)
def test_other_rules_than_the_known_ones_are_not_proved(change: dict[str, Any]) -> None:
    assert prove(train("gpt2")) is not None
    assert prove(rebuilt(train("gpt2"), **change)) is None


def test_merges_that_are_not_in_the_order_of_their_ids_are_not_proved() -> None:
    merges = json.loads(train("gpt2").to_str())["model"]["merges"]
    assert prove(rebuilt(train("gpt2"), merges=merges[::-1])) is None


def test_texts_with_added_tokens_that_take_blanks_along_are_left_to_the_hugging_face_tokenizer() -> None:
    backend = rebuilt(train("gpt2"))
    backend.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)])
    ours = fastest(BackendEncode(backend))
    assert isinstance(ours, BytePairEncode)
    assert ours._encode("a <mask> b") is None and ours._encode("a b") is not None
    assert ours(["a <mask> b", "a b"]) == BackendEncode(backend)(["a <mask> b", "a b"])
