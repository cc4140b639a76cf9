"""A rank file gives the ids and the fingerprint of the Hugging Face tokenizer that has the same vocabulary."""

import base64
import json
import pickle
import pydoc_data.topics
from pathlib import Path

import pytest

import tiny_data
from megatron_lrc.config import ConfigError
from megatron_lrc.data.loaded_tokenizer import are_alike
from megatron_lrc.data.tiktoken_files import JSON_SPECIAL_TOKENS, PATTERNS, TiktokenOptions
from megatron_lrc.data.tokenizers import load_tokenizer
from preprocess_tool import check_refused, preprocess
from tiny_data import read_documents
from tools_path import tool_main

TEXTS = list(pydoc_data.topics.topics.values())
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
AWKWARD = [
    "a <|eot_id|>\n<|eot_id|><|end_of_text|> b  <|begin_of_text|>   \n\n c<|eot_id",
    "I'LL don't  1234567 na\u00efve \u4e2d\u6587\u3002 \U0001f600 e\u0301 \u0130\u017f \u00a0\u2003x\t\r\n\r\n  end ",
    "\x00\x7f\ufeff \u0661\u0662\u0663\u0664 \u1e9e\u01c5 " + "ab" * 3000,
    " ",
]


def byte_pair_tokenizer(vocabulary: list[str], model, pattern: str):
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    tokenizer = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.add_special_tokens(vocabulary)
    return tokenizer


def train_tokenizer(pattern: str, special_tokens: list[str], *, texts: list[str] | None = None):
    """The library's own BPE, special tokens after the others or, as the trainer's own, before."""
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = byte_pair_tokenizer([], models.BPE(ignore_merges=True), pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts or [*TEXTS, *AWKWARD], trainer)
    return tokenizer


def save(tokenizer, folder: Path, **roles: str) -> Path:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)
    return folder


def tokens_of(tokenizer) -> list[bytes]:
    """The bytes of all tokens that are not special, in the order of their ids; spelling undone by the library."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [bytes(byte_of[character] for character in token) for token, _ in vocabulary if token not in special]


def write_ranks(path: Path, tokens: list[bytes]) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    path.write_text("".join(lines))
    return path


def write_json(path: Path, tokens: list[bytes]) -> Path:
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A rank file, and the directory that was trained: special tokens follow the ranks, as in Llama 3."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = train_tokenizer(PATTERNS["llama3"], [])
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    save(tokenizer, folder / "hf", bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    return write_ranks(folder / "tokenizer.model", tokens_of(tokenizer)), folder / "hf"


LLAMA_FLAGS = ("--tiktoken-pattern", "llama3", "--tiktoken-special-tokens", *SPECIAL_TOKENS)
LLAMA_OPTIONS = TiktokenOptions(pattern="llama3", special_tokens=SPECIAL_TOKENS)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_rank_file_gives_the_documents_of_the_directory(tmp_path, llama, workers):
    ranks, directory = llama
    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", [*AWKWARD, *TEXTS])
    flags = ("--input", source, "--append-eod", "--workers", workers, "--output-prefix")
    of_ranks = ("--tokenizer-type", "TikTokenizer", "--tokenizer-model", ranks, *LLAMA_FLAGS)
    assert preprocess(*flags, tmp_path / "ranks", *of_ranks) == 0
    assert preprocess(*flags, tmp_path / "hf", "--tokenizer-model", directory) == 0
    documents = read_documents(tmp_path / "ranks_text_document")
    assert documents == read_documents(tmp_path / "hf_text_document")
    assert documents[0].count(2002) == 2 and documents[0][-1] == 2001
    manifests = [json.loads((tmp_path / f"{name}_text_document.json").read_text()) for name in ("ranks", "hf")]
    assert are_alike(*(manifest["tokenizer"] for manifest in manifests))
    assert manifests[0]["tokenizer"]["vocab_size"] == manifests[1]["tokenizer"]["vocab_size"] == 2003


def test_transformers_conversion_of_the_rank_file_agrees(tmp_path, llama, monkeypatch):
    from transformers.convert_slow_tokenizer import TikTokenConverter

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # or another run's file of this path is read
    ranks, _ = llama
    converter = TikTokenConverter(str(ranks), extra_special_tokens=SPECIAL_TOKENS)
    assert converter.pattern == PATTERNS["llama3"]
    converted = converter.converted()
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    directory = load_tokenizer(str(save(converted, tmp_path / "hf", **roles)))
    options = TiktokenOptions(pattern="llama3", special_tokens=SPECIAL_TOKENS, eos_token="<|eot_id|>")
    file = load_tokenizer(str(ranks), "TikTokenizer", options)
    assert file.encode_batch([*AWKWARD, *TEXTS]) == directory.encode_batch([*AWKWARD, *TEXTS])
    assert directory.made(file.as_manifest()) and file.bos == directory.bos
    base = load_tokenizer(str(ranks), "TikTokenizer", LLAMA_OPTIONS)
    assert not directory.made(base.as_manifest())  # whose EOS is another


def test_a_directory_whose_rank_file_was_replaced_has_the_new_ids(tmp_path, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(tmp_path / "cache"))  # tiktoken's cache, by path
    directory = tmp_path / "model"
    directory.mkdir()
    roles = {"bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[1]}
    label = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    (directory / "tokenizer_config.json").write_text(json.dumps(label))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ids = []
    for texts in (["the cat"], ["cathedral"]):
        tokenizer = train_tokenizer(PATTERNS["llama3"], [], texts=texts)
        write_ranks(directory / "tokenizer.model", tokens_of(tokenizer))
        ids.append(load_tokenizer(str(directory)).encode_batch(["cathedral"]))
        assert ids[-1] == [tokenizer.encode("cathedral").ids]
    assert ids[0] != ids[1]


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_megatrons_json_gives_what_megatron_core_and_a_directory_make_of_it(tmp_path, pattern):
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    fillers = [f"<SPECIAL_{index}>" for index in range(7, 20)]
    trained = train_tokenizer(PATTERNS[pattern], [*JSON_SPECIAL_TOKENS, *fillers])
    tokens = [*(bytes([byte]) for byte in range(256)), *tokens_of(trained)[256:]]  # megatron-core wants bytes in order
    file = write_json(tmp_path / "vocabulary.json", tokens)
    options = TiktokenOptions(pattern=pattern, num_special_tokens=20, vocab_size=1500)
    ours = load_tokenizer(str(file), "TikTokenizer", options)
    megatrons = TikTokenTokenizer(str(file), num_special_tokens=20, pattern=pattern, vocab_size=1500)
    texts = [*AWKWARD, "<s>[<SPECIAL_19>] x</s>", *TEXTS]
    assert ours.encode_batch(texts) == [megatrons.text_to_ids(text) for text in texts]
    assert (ours.vocab_size, ours.bos, ours.eod) == (1500, megatrons.bos_id, megatrons.eod)

    whole = load_tokenizer(
        str(write_json(file, tokens_of(trained))),
        "TikTokenizer",
        TiktokenOptions(pattern=pattern, num_special_tokens=20),
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    directory = load_tokenizer(str(save(trained, tmp_path / "hf", **roles)))
    assert whole.encode_batch(texts) == directory.encode_batch(texts)
    assert directory.made(whole.as_manifest())


def test_special_tokens_that_are_not_named_are_filled_up(llama):
    ranks, _ = llama
    options = TiktokenOptions(pattern="v2", special_tokens=["<s>", "</s>"], num_special_tokens=8)
    tokenizer = load_tokenizer(str(ranks), "TikTokenizer", options)
    assert tokenizer.encode_batch(["<s></s><SPECIAL_2><SPECIAL_7>"]) == [[2000, 2001, 2002, 2007]]
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod) == (2008, 2000, 2001)


def test_a_pickled_tokenizer_encodes_the_same(llama):
    tokenizer = load_tokenizer(str(llama[0]), "TikTokenizer", LLAMA_OPTIONS)
    assert pickle.loads(pickle.dumps(tokenizer)).encode_batch(TEXTS[:9]) == tokenizer.encode_batch(TEXTS[:9])


def test_the_pattern_belongs_to_the_fingerprint(llama):
    named, other = (
        load_tokenizer(str(llama[0]), "TikTokenizer", TiktokenOptions(pattern=pattern)) for pattern in ("llama3", "v2")
    )
    spelled = load_tokenizer(str(llama[0]), "TikTokenizer", TiktokenOptions(pattern=PATTERNS["llama3"]))
    assert named.encode_batch(TEXTS) != other.encode_batch(TEXTS)
    assert named.fingerprint != other.fingerprint and named.probes != other.probes
    assert named.fingerprint == spelled.fingerprint


BYTES = [bytes([byte]) for byte in range(256)]
LINES = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate([*BYTES, b"ab", b"cd"])]
BAD_FILES = {
    "not a rank file": ("some text of several words", ":1 is not a token in base64 and its rank"),
    "bad base64": ("\n".join([*LINES, "YW*JjZA== 258"]), ":259 is not a token in base64"),
    "no rank": ("\n".join([*LINES, "YWJj x"]), ":259 is not a token in base64"),
    "rank below 0": ("YWJj -1", ":1 is not a token in base64"),
    "rank twice": ("\n".join([*LINES, "YWJj 257"]), "has the rank 257 twice"),
    "token twice": ("\n".join([*LINES, "YWI= 258"]), "has the token b'ab' twice"),
    "rank missing": ("\n".join([*LINES, "YWJj 259"]), "none of rank 258"),
    "empty": ("", "has 0 tokens"),
    "byte missing": ("YWJj 0", "no token for the byte 0x00 (256 of 256 are lacking)"),
    "not Megatron's JSON": ('[{"rank": 0, "token_str": "a"}]', "Entry 0 of"),
    "broken JSON": ("[", "is not Megatron-LM's JSON"),
    "bad base64 in JSON": ('[{"rank": 0, "token_bytes": "YQ==", "token_str": ""}, '
        '{"rank": 1, "token_bytes": "*", "token_str": ""}]', "Entry 1 of"),
}  # fmt: skip


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_sentence(tmp_path, capsys, content, message):
    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", ["word1"])
    (tmp_path / "ranks").write_text(content)
    flags = ("--input", source, "--output-prefix", tmp_path / "o", "--tokenizer-type", "TikTokenizer")
    check_refused(capsys, message, *flags, "--tokenizer-model", tmp_path / "ranks", "--tiktoken-pattern", "v2")


BAD_FLAGS = {
    "no pattern": ([], "needs --tiktoken-pattern"),
    "unknown pattern": (["--tiktoken-pattern", "v3"], "no tiktoken pattern 'v3'"),
    "no regular expression": (["--tiktoken-pattern", "(a"], "is no regular expression"),
    "not one of tiktoken's": (["--tiktoken-pattern", r"(?|a|b)|[\s\S]"], "is no regular expression"),
    "loses text": (["--tiktoken-pattern", r"\w+|\s+"], "leaves out some characters"),
    "matches nothing": (["--tiktoken-pattern", r"\w*|[\s\S]"], "matches nothing at all"),
    "too many": (["--tiktoken-special-tokens", "<a>", "<b>", "--tiktoken-num-special-tokens", "1"], "raise it"),
    "one twice": (["--tiktoken-special-tokens", "<a>", "<a>"], "'<a>' is given twice"),
    "one begins another": (["--tiktoken-special-tokens", "<a", "<b>", "<a>"], "'<a' begins '<a>'"),
    "empty one": (["--tiktoken-special-tokens", ""], "is empty"),
    "no such BOS": (["--tiktoken-bos-token", "<x>"], "--tiktoken-bos-token '<x>' is not among the 0 special tokens"),
    "no such EOS": (["--tiktoken-eos-token", "<x>"], "--tiktoken-eos-token '<x>' is not among the 0 special tokens"),
    "too large": (["--vocab-size", "9999"], "--vocab-size 9999 is not within"),
    "too small": (["--vocab-size", "100"], "no token for the byte"),
    "no EOS": (["--append-eod"], "has no EOS token"),
    "another type": (["--tokenizer-type", "SentencePieceTokenizer"], "are for --tokenizer-type TikTokenizer"),
    "no file": (["--tokenizer-model", "nowhere"], "no rank file 'nowhere'"),
}


@pytest.mark.parametrize("arguments, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_are_one_sentence(tmp_path, capsys, llama, arguments, message):
    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", ["word1"])
    flags = ["--input", source, "--output-prefix", tmp_path / "o", "--tokenizer-model", llama[0]]
    flags += ["--tokenizer-type", "TikTokenizer"]
    if message != BAD_FLAGS["no pattern"][1]:
        flags += ["--tiktoken-pattern", "v2"]
    check_refused(capsys, message, *flags, *arguments)


def test_samples_are_decoded_with_the_tokenizer_that_the_manifest_describes(tmp_path, capsys, llama):
    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", ["the language model"])
    flags = ["--input", source, "--output-prefix", tmp_path / "o", "--tokenizer-model", llama[0]]
    specials = ["--tiktoken-special-tokens", *(LLAMA_OPTIONS.special_tokens or [])]
    assert preprocess(*flags, "--tokenizer-type", "TikTokenizer", "--tiktoken-pattern", "llama3", *specials) == 0
    assert tool_main("inspect_data")([str(tmp_path / "o_text_document"), "--samples", "1"]) == 0
    assert '"the language model"' in capsys.readouterr().out


def test_a_text_that_tiktoken_cannot_split_is_one_sentence(llama):
    tokenizer = load_tokenizer(str(llama[0]), "TikTokenizer", LLAMA_OPTIONS)
    with pytest.raises(ConfigError, match=r"longest of whose batch has 3,000,000 characters .*stack"):
        tokenizer.encode_batch(["a", " " * 3_000_000])
