"""The ids are those of the directory's own tokenizer.json or .model, and what decides them is in the fingerprint."""

import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from megatron_lrc.config import ConfigError
from megatron_lrc.data.directory_tokenizer import open_tokenizer
from megatron_lrc.data.loaded_tokenizer import are_alike
from megatron_lrc.data.tokenizer_probes import PLAIN_TEXTS, find_difference, with_special_tokens
from megatron_lrc.data.tokenizers import load_tokenizer
from tokenizer_files import (
    byte_level,
    copy_with,
    llama2_style,
    write_directory,
    write_model_directory,
    write_sentencepiece,
)

TEXTS = [*PLAIN_TEXTS, *with_special_tokens(["<s>", "</s>"]), " the cat", "<s>[INST] the", "in 2023"]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("label", ["LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", None])
@pytest.mark.parametrize("make", [llama2_style, byte_level])
def test_ids_are_those_of_the_file_whatever_its_label(tmp_path: Path, make, label, model_type) -> None:
    own = make()
    directory = write_directory(tmp_path / "d", own, label=label, model_type=model_type, legacy=False)
    loaded = load_tokenizer(str(directory))
    expected = [encoding.ids for encoding in own.encode_batch(TEXTS, add_special_tokens=False)]
    assert loaded.encode_batch(TEXTS) == expected
    assert open_tokenizer(directory)(TEXTS, add_special_tokens=False)["input_ids"] == expected
    other = write_directory(tmp_path / "o", own, label="PreTrainedTokenizerFast", model_type="llama")
    assert load_tokenizer(str(other)).fingerprint == loaded.fingerprint  # a label decides nothing


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"normalizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}},
        {"decoder": {"type": "Fuse"}},
    ],
    ids=["normalizer", "no normalizer", "pre-tokenizer", "decoder"],
)
def test_the_rules_for_text_belong_to_the_fingerprint(tmp_path: Path, changes: dict) -> None:
    directory = write_directory(tmp_path / "d", llama2_style(), label="LlamaTokenizer", model_type="llama")
    original = load_tokenizer(str(directory))
    other = load_tokenizer(str(copy_with(directory, tmp_path / "other", **changes)))
    assert other.vocab_size == original.vocab_size
    assert other.fingerprint != original.fingerprint and not original.made(other.as_manifest())


def test_merges_belong_to_the_fingerprint_and_their_spelling_does_not(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "d", byte_level(), label="PreTrainedTokenizerFast", model_type="llama")
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    original = load_tokenizer(str(directory))
    spelled = {**model, "merges": [" ".join(pair) for pair in model["merges"]], "dropout": None}
    assert load_tokenizer(str(copy_with(directory, tmp_path / "s", model=spelled))).fingerprint == original.fingerprint
    turned = {**model, "merges": model["merges"][::-1]}
    assert load_tokenizer(str(copy_with(directory, tmp_path / "t", model=turned))).fingerprint != original.fingerprint
    whole = {**model, "ignore_merges": True}
    assert load_tokenizer(str(copy_with(directory, tmp_path / "w", model=whole))).fingerprint != original.fingerprint


def test_a_model_file_and_a_directory_are_alike_only_where_their_ids_are(tmp_path: Path) -> None:
    """They share their vocabulary, and text that spells special tokens still differs: "</s>" is text to the file."""
    file = load_tokenizer(str(write_sentencepiece(tmp_path / "file")))
    directory = load_tokenizer(str(write_model_directory(tmp_path / "directory")))
    assert file.vocab_size == directory.vocab_size
    assert file.encode_batch(list(PLAIN_TEXTS)) == directory.encode_batch(list(PLAIN_TEXTS))
    assert file.encode_batch(["a</s>"]) != directory.encode_batch(["a</s>"])
    assert not directory.made(file.as_manifest())


def test_a_directory_without_tokenizer_json_has_the_ids_of_its_model_file(tmp_path: Path) -> None:
    directory = write_model_directory(tmp_path / "directory")
    processor = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    texts = [*PLAIN_TEXTS, " the cat", "    def f"]
    assert load_tokenizer(str(directory)).encode_batch(texts) == [processor.encode(text) for text in texts]


def test_a_configuration_that_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    """transformers lets added_tokens_decoder override tokenizer.json."""
    eos = {"content": "</s>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
    decoder = {"2": {**eos, "special": True}}
    directory = write_directory(
        tmp_path / "d", byte_level(), label="PreTrainedTokenizerFast", model_type="llama", added_tokens_decoder=decoder
    )
    own = Tokenizer.from_file(str(directory / "tokenizer.json"))
    try:
        loaded = load_tokenizer(str(directory))
    except ConfigError as error:
        assert "does not follow" in str(error) and "added_tokens_decoder" in str(error)
    else:  # a version that does not let it
        assert loaded.encode_batch(["a </s> b"]) == [own.encode("a </s> b").ids]


def test_a_damaged_tokenizer_json_is_named(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "d", byte_level(), label="LlamaTokenizer", model_type="llama")
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json is no tokenizer that tokenizers .* reads"):
        load_tokenizer(str(directory))


def test_a_difference_says_how_many_texts_and_which(tmp_path: Path) -> None:
    first = write_directory(tmp_path / "a", byte_level(), label="LlamaTokenizer", model_type="llama")
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    digits = {"type": "Digits", "individual_digits": True}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [digits, by_bytes]}
    second = copy_with(first, tmp_path / "b", pre_tokenizer=pre_tokenizer)
    encoders = [load_tokenizer(str(path)).encode_batch for path in (first, second)]
    found = find_difference(*encoders, ["brown", "In 2023,"])
    assert found is not None and (found.text, found.num_different, found.num_texts) == ("In 2023,", 1, 2)
    assert str(found).startswith("1 of 2 test texts get other ids, the first being 'In 2023,': [")
    assert find_difference(encoders[0], encoders[0], TEXTS) is None


def with_config(tmp_path: Path, **config) -> Path:
    return write_directory(tmp_path / "d", byte_level(), label="PreTrainedTokenizerFast", model_type="llama", **config)


def added(content: str, **flags) -> dict:
    return {"content": content, "normalized": False, "single_word": False, "special": True, **flags}


def test_padding_and_truncation_of_the_file_are_for_model_calls(tmp_path: Path) -> None:
    padded = Tokenizer.from_str(byte_level().to_str())
    padded.enable_padding(length=40)
    padded.enable_truncation(3)
    directory = write_directory(tmp_path / "d", padded, label="PreTrainedTokenizerFast", model_type="llama")
    assert load_tokenizer(str(directory)).encode_batch(["The quick brown fox"]) == [
        byte_level().encode("The quick brown fox").ids
    ]


def test_null_and_false_of_a_normalizer_are_told_apart(tmp_path: Path) -> None:
    rules = {"type": "BertNormalizer", "clean_text": False, "handle_chinese_chars": False, "lowercase": True}
    source = with_config(tmp_path)
    found = [
        load_tokenizer(str(copy_with(source, tmp_path / str(strip), normalizer={**rules, "strip_accents": strip})))
        for strip in (None, False)
    ]
    assert found[0].fingerprint != found[1].fingerprint


def test_equal_fingerprints_do_not_outweigh_other_ids(tmp_path: Path) -> None:
    made = load_tokenizer(str(with_config(tmp_path))).as_manifest()
    assert are_alike(made, made) and not are_alike(made, {**made, "probes": "0" * 64})
    assert are_alike(made, {"fingerprint": made["fingerprint"]})


def test_every_added_token_is_compared_and_not_only_those_with_a_role(tmp_path: Path) -> None:
    own = Tokenizer.from_str(byte_level().to_str())
    own.add_special_tokens(["<|x|>"])
    decoder = {str(own.token_to_id("<|x|>")): added("<|x|>", lstrip=True, rstrip=True)}
    directory = write_directory(
        tmp_path / "d", own, label="PreTrainedTokenizerFast", model_type="llama", added_tokens_decoder=decoder
    )
    with pytest.raises(ConfigError, match="does not follow .*tokenizer.json: .*added_tokens_decoder"):
        load_tokenizer(str(directory))


@pytest.mark.parametrize("config", [{"eos_token": "<|new|>"}, {"additional_special_tokens": ["<|new|>"]}])
def test_tokens_for_which_transformers_makes_up_an_id_are_refused(tmp_path: Path, config: dict) -> None:
    with pytest.raises(ConfigError, match="names the token '<|new|>'.*make up an id for it"):
        load_tokenizer(str(with_config(tmp_path, **config)))


def test_tokens_whose_id_the_directory_gives_are_taken(tmp_path: Path) -> None:
    size = byte_level().get_vocab_size()
    declared = {str(size): added("<|new|>", lstrip=False, rstrip=False)}
    tokenizer = load_tokenizer(str(with_config(tmp_path, added_tokens_decoder=declared)))
    assert tokenizer.encode_batch(["<|new|>"]) == [[size]]


def test_merges_left_out_by_chance_are_refused(tmp_path: Path) -> None:
    source = with_config(tmp_path)
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    directory = copy_with(source, tmp_path / "chance", model={**model, "dropout": 0.0002})
    with pytest.raises(ConfigError, match="leaves out merges by chance"):
        load_tokenizer(str(directory))


def test_a_vocabulary_file_is_loaded_or_refused_by_its_label(tmp_path: Path) -> None:
    """Without tokenizer.json, transformers 5 makes an empty tokenizer of vocab.json under Llama's label."""
    tmp_path.joinpath("d").mkdir()
    byte_level().model.save(str(tmp_path / "d"))
    (tmp_path / "d" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    labels = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "d" / "tokenizer_config.json").write_text(json.dumps({**labels, "tokenizer_class": "GPT2Tokenizer"}))
    assert load_tokenizer(str(tmp_path / "d")).vocab_size == byte_level().get_vocab_size()
    (tmp_path / "d" / "tokenizer_config.json").write_text(json.dumps({**labels, "tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(ConfigError, match="vocab.json as LlamaTokenizer, which has the id"):
        load_tokenizer(str(tmp_path / "d"))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100000], ids=["a list", "broken", "deep"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, name: str, content: str) -> None:
    directory = with_config(tmp_path)
    (directory / name).write_text(content)
    with pytest.raises(ConfigError, match=name):
        load_tokenizer(str(directory))
