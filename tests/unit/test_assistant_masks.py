"""PREFIX.mask: what preprocess_data.py writes of chats, and all who read it."""

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

import tiny_data
from chat_formats import CHATS, FORMATS, write_chat_tokenizer
from config_cases import data_config
from megatron_lrc.config import ConfigError
from megatron_lrc.data import assistant_masks, counted_tokens, encoding, indexing
from megatron_lrc.data.assistant_masks import MaskWriter, open_mask
from megatron_lrc.data.assistant_turns import mark_tokens
from megatron_lrc.data.data_checks import check_data
from megatron_lrc.data.datasets import build_datasets
from megatron_lrc.data.inspection import load_decoder
from megatron_lrc.data.records import as_marked_chat
from megatron_lrc.data.tokenizers import load_tokenizer
from preprocess_tool import check_refused, file_names, preprocess
from tools_path import tool_main

merge_datasets, inspect_data = tool_main("merge_datasets"), tool_main("inspect_data")
FORM = FORMATS["chatml"]
VOCABULARY = 400


def read_mask(prefix: object) -> list[bool]:
    """By the format's description, without the package."""
    content = Path(f"{prefix}.mask").read_bytes()
    magic, version, num_tokens, num_counted = struct.unpack("<8sQQQ", content[:32])
    assert (magic, version) == (b"LRCMASK\0", 1) and len(content) == 32 + -(-num_tokens // 8)
    bits = [bool(content[32 + n // 8] >> n % 8 & 1) for n in range(num_tokens)]
    assert sum(bits) == num_counted and sum(byte.bit_count() for byte in content[32:]) == num_counted
    entry = json.loads(Path(f"{prefix}.json").read_text())["mask"]
    assert entry == {"counted_tokens": num_counted, "crc32": zlib.crc32(content)}
    return bits


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> str:
    """Every turn ends with the end-of-document token, as in Qwen's and SmolLM2's tokenizers."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_chat_tokenizer(folder, FORM.template(markers=False), FORM.special_tokens)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|im_end|>"}))
    return str(folder)


@pytest.fixture(scope="module")
def rows() -> list[object]:
    """Chats, texts among them, an empty one, and one with two keys."""
    chats = [chat for name, chat in CHATS.items() if name != "nobody answers"]
    return [*tiny_data.make_texts(3), *chats * 30, CHATS["nobody answers"], "", *tiny_data.make_texts(5), *chats]


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer_folder, rows) -> str:
    folder = tmp_path_factory.mktemp("prepared")
    assert preprocess_rows(folder, tokenizer_folder, rows, "--append-eod") == 0
    return str(folder / "out_text_document")


def preprocess_rows(folder: Path, tokenizer: str, rows: list[object], *flags: object) -> int:
    source = write_rows(folder / "rows.jsonl", rows)
    return preprocess("--input", source, "--tokenizer-model", tokenizer, "--output-prefix", folder / "out", *flags)


def expected_documents(rows: list[object], folder: str, after: list[int]) -> list[tuple[list[int], list[bool]]]:
    tokenizer, found = load_tokenizer(folder), []
    for row in filter(None, rows):
        if isinstance(row, str):
            ids = tokenizer.encode_batch([row])[0] + after
            found.append((ids, [True] * len(ids)))
        else:
            marked = mark_tokens(as_marked_chat(row, "text", tokenizer.chat), tokenizer.encode_batch)
            found.append((marked.ids + after, marked.mask.tolist() + [False] * len(after)))
    return found


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("workers", [1, 2])
def test_every_token_of_chats_is_marked_and_text_counts_whole(tmp_path, tokenizer_folder, rows, monkeypatch, workers):
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 500)
    flags = ("--append-eod", "--workers", workers)
    assert preprocess_rows(tmp_path, tokenizer_folder, rows, *flags) == 0
    documents = expected_documents(rows, tokenizer_folder, [load_tokenizer(tokenizer_folder).eod])
    assert tiny_data.read_documents(tmp_path / "out_text_document") == [ids for ids, _ in documents]
    assert read_mask(tmp_path / "out_text_document") == [bit for _, mask in documents for bit in mask]


def test_only_chats_have_a_mask_and_a_flag_leaves_it_out(tmp_path, tokenizer_folder, rows, capsys):
    assert preprocess_rows(tmp_path, tokenizer_folder, rows) == 0
    names = {f"out_text_document{suffix}" for suffix in (".bin", ".idx", ".json")}
    others = {"rows.jsonl", ".out_text_document.lock"}
    assert file_names(tmp_path) - others == names | {"out_text_document.mask"}
    assert "count in the losses (" in capsys.readouterr().out
    with_mask = (tmp_path / "out_text_document.bin").read_bytes()
    assert preprocess_rows(tmp_path, tokenizer_folder, rows, "--no-assistant-mask") == 0
    assert file_names(tmp_path) - others == names  # the older mask does not stay beside the new data
    assert (tmp_path / "out_text_document.bin").read_bytes() == with_mask
    assert preprocess_rows(tmp_path, tokenizer_folder, tiny_data.make_texts(5)) == 0
    assert file_names(tmp_path) - others == names
    assert "mask" not in json.loads((tmp_path / "out_text_document.json").read_text())


def test_a_chat_that_cannot_be_marked_is_a_bad_line(tmp_path, tokenizer_folder, rows, capsys):
    source = write_rows(tmp_path / "rows.jsonl", [*rows[:4], CHATS["one question"][1:]])
    flags = ("--input", source, "--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "out")
    check_refused(capsys, "rows.jsonl:5: which tokens are the assistant's is not known", *flags)
    assert preprocess(*flags, "--on-bad-line", "skip") == 0
    assert len(tiny_data.read_documents(tmp_path / "out_text_document")) == 4


def test_a_cap_cuts_mask_and_tokens_alike(tmp_path, tokenizer_folder, rows):
    assert preprocess_rows(tmp_path, tokenizer_folder, rows, "--max-tokens", 200) == 0
    documents = tiny_data.read_documents(tmp_path / "out_text_document")
    wanted = expected_documents(rows, tokenizer_folder, [])[: len(documents)]
    assert read_mask(tmp_path / "out_text_document") == [bit for _, mask in wanted for bit in mask]


def test_interrupted_at_every_chunk_the_mask_comes_out_the_same(tmp_path, tokenizer_folder, rows, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 500)
    monkeypatch.setattr("megatron_lrc.data.restart.SECONDS_BETWEEN", 0.0)
    options = indexing.IndexingOptions(
        input=[str(write_rows(tmp_path / "rows.jsonl", rows))],
        output_prefix=str(tmp_path / "whole"),
        tokenizer_model=tokenizer_folder,
    )
    indexing.index_documents(options, report=lambda line: None)
    wanted = Path(f"{options.output_prefix}_text_document.mask").read_bytes()
    stopped, interrupted = replace(options, output_prefix=str(tmp_path / "stopped"), log_interval=1), 0
    while interrupted < 200:
        lines: list[str] = []

        def stop(line: str, lines: list[str] = lines) -> None:
            lines.append(line)
            if len(lines) == 7:
                raise KeyboardInterrupt

        try:
            indexing.index_documents(stopped, report=stop)
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert 3 < interrupted < 200
    assert Path(f"{stopped.output_prefix}_text_document.mask").read_bytes() == wanted


@pytest.mark.parametrize("sizes", [[0, 3, 5, 8, 1, 30], [7, 0, 1], [64], [1] * 9])
def test_a_mask_of_pieces_of_any_size_that_others_go_on_with(tmp_path, sizes):
    path = str(tmp_path / "data.mask")
    bits, writer = numpy.random.default_rng(0).integers(0, 2, sum(sizes)).astype(bool), MaskWriter(path)
    start = 0
    for size in sizes:
        writer.add(bits[start : start + size])
        start += size
        writer.file.write(b"what was not finished")
        writer.file.close()
        writer = MaskWriter(path, num_tokens=start, num_counted=writer.num_counted, tail=writer.tail)
    mask = open_mask(str(tmp_path / "data"), {"mask": writer.complete()}, len(bits))
    assert mask is not None
    mask.check()
    for first in range(len(bits)):
        for length in {0, 1, *(n for n in (7, 8, 9) if first + n <= len(bits)), len(bits) - first}:
            assert (mask.bits(first, length) == bits[first : first + length]).all()


# ------------------------------------------------------------------------------------------------ other tools


def test_merging_puts_masks_end_to_end_and_counts_the_others_whole(tmp_path, prepared, tokenizer_folder, monkeypatch):
    monkeypatch.setattr("megatron_lrc.data.indexed_files._PIECE", 100)
    assert preprocess_rows(tmp_path, tokenizer_folder, tiny_data.make_texts(4)) == 0
    text = str(tmp_path / "out_text_document")
    inputs = [text, prepared, text, prepared]
    assert merge_datasets(["--input", *inputs, "--output-prefix", str(tmp_path / "all")]) == 0
    whole, chats = [True] * json.loads(Path(f"{text}.json").read_text())["tokens"], read_mask(prepared)
    assert read_mask(tmp_path / "all") == [*whole, *chats, *whole, *chats]
    assert merge_datasets(["--input", text, text, "--output-prefix", str(tmp_path / "all")]) == 0
    assert not (tmp_path / "all.mask").exists()


def test_a_mask_is_not_merged_where_no_manifest_could_name_it(tmp_path, prepared, capsys):
    other = tiny_data.write_dataset(tmp_path / "other", [[1, 2, 3]])
    assert merge_datasets(["--input", prepared, other, "--output-prefix", str(tmp_path / "all")]) == 2
    assert f"{other} has no manifest" in capsys.readouterr().err


def test_inspection_shows_the_share_and_what_counts(prepared, tokenizer_folder, capsys):
    assert inspect_data([prepared, "--verify", "--samples", "4"]) == 0
    printed, bits = capsys.readouterr().out, read_mask(prepared)
    assert f"in losses    {sum(bits):,} tokens ({sum(bits) / len(bits):.1%}): of chats" in printed
    assert "checksum of the mask" in printed
    decode = load_decoder(load_tokenizer(tokenizer_folder))
    ids, mask = expected_documents([CHATS["one question"]], tokenizer_folder, [])[0]
    answer = decode([token for token, bit in zip(ids, mask, strict=True) if bit])
    assert answer.endswith("<|im_end|>") and f"that count: {json.dumps([answer], ensure_ascii=False)}\n" in printed


# ------------------------------------------------------------------------------------------------ damage


def copy_of(prefix: str, folder: Path) -> str:
    for suffix in (".bin", ".idx", ".json", ".mask"):
        (folder / f"data{suffix}").write_bytes(Path(prefix + suffix).read_bytes())
    return str(folder / "data")


def lose_manifest(mask: Path) -> None:
    mask.with_suffix(".json").unlink()


def flip(mask: Path, at: int) -> None:
    content = bytearray(mask.read_bytes())
    content[at] ^= 4
    mask.write_bytes(content)


def set_entry(mask: Path, value: object) -> None:
    path = mask.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask": value}))


DAMAGES = {
    "missing": (Path.unlink, "data.mask is missing or no such file"),
    "cut": (lambda mask: mask.write_bytes(mask.read_bytes()[:-1]), "is not the mask of"),
    "longer": (lambda mask: mask.write_bytes(mask.read_bytes() + b"\0"), "is not the mask of"),
    "header": (lambda mask: flip(mask, 25), "is not the mask of"),
    "bit": (lambda mask: flip(mask, 40), "data.mask is damaged: its checksum is not the manifest's"),
    "something else": (lambda mask: mask.write_bytes(b"x"), "data.mask is missing or no such file"),
    "no manifest": (lose_manifest, "data.json is not there"),
    "not named": (lambda mask: set_entry(mask, None), "data.json does not name it"),
    "no number": (lambda mask: set_entry(mask, {"counted_tokens": "1", "crc32": 1}), "is not a manifest of"),
    "no entry": (lambda mask: set_entry(mask, [1]), "is not a manifest of"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_sentence_of_every_tool_and_of_training(tmp_path, prepared, tokenizer_folder, capsys, name):
    prefix = copy_of(prepared, tmp_path)
    damage, message = DAMAGES[name]
    damage(Path(f"{prefix}.mask"))
    config = data_config(data_path=[prefix], split="1,1", teacher=tokenizer_folder)
    with pytest.raises(ConfigError, match="^[^\n]*$") as caught:
        check_data(config, VOCABULARY)
    assert message in str(caught.value)
    assert inspect_data([prefix, "--verify"]) == 2
    assert message in capsys.readouterr().err
    assert merge_datasets(["--input", prefix, prefix, "--output-prefix", str(tmp_path / "all")]) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ training


def write_masked(prefix: Path, lengths: list[int], *, first: int = 0) -> tuple[str, numpy.ndarray]:
    """A dataset in which every token's id says where it stands, and a random mask of it."""
    from megatron_lrc.data.writing import DatasetWriter, publish

    size = sum(lengths)
    bits = numpy.random.default_rng(first).integers(0, 2, size).astype(bool)
    writer = DatasetWriter(str(prefix), vocab_size=1 << 20)
    writer.add(numpy.arange(first, first + size, dtype=numpy.int32), lengths, bits)
    tokenizer = {"fingerprint": "x", "vocab_size": 1 << 20, "eod": first + 3, "model": None}
    writer.complete({"tokenizer": tokenizer, "documents": len(lengths), "tokens": size, "dtype": "int32"})
    publish(str(prefix))
    writer.close()
    return str(prefix), bits


LENGTHS = [5, 40, 1, 1, 17, 16, 33, 2, 60]


def test_a_position_counts_if_its_label_does_on_every_sample(tmp_path):
    """In a blend with a dataset that has no mask, over several passes, in training and validation."""
    prefix, bits = write_masked(tmp_path / "chats", LENGTHS * 3)
    plain = tiny_data.numbered(tmp_path / "plain", 5, first=10_000)
    config = data_config(data_path=[prefix, plain], split="1,1", train_iters=20)
    for dataset in build_datasets(config):
        assert dataset is not None
        seen = set()
        for index in range(len(dataset)):
            sample = dataset[index]
            labels = sample["labels"].numpy()
            is_masked = labels < 10_000
            expected = numpy.where(is_masked, bits[labels % len(bits)], True).astype(numpy.float32)
            assert sample["loss_mask"].tolist() == expected.tolist()
            seen |= set(is_masked.tolist())
        assert seen == {True, False}
    for dataset in build_datasets(replace(config, data=replace(config.data, train_on_inputs=True))):
        assert dataset is not None
        assert all(bool(dataset[index]["loss_mask"].all()) for index in range(len(dataset)))


def test_documents_are_the_chats_whatever_ends_a_turn(tmp_path):
    """Id 3 is the end-of-document token, and stands within the first document only."""
    prefix, _ = write_masked(tmp_path / "chats", LENGTHS)
    starts = set(numpy.cumsum([0, *LENGTHS[:-1]]).tolist())
    config = data_config(data_path=[prefix], split="1,0,0", train_iters=4, reset_attention_mask=True)
    train, _ = build_datasets(config)
    assert train is not None
    num_starts = 0
    for index in range(len(train)):
        sample, place = train[index], -1
        for token, position in zip(sample["tokens"].tolist(), sample["position_ids"].tolist(), strict=True):
            place = 0 if token in starts else place + 1
            assert position == place
            num_starts += token in starts
    assert num_starts > len(LENGTHS)


def test_masks_of_flags_are_taken_together(tmp_path):
    prefix, bits = write_masked(tmp_path / "chats", LENGTHS)
    config = data_config(data_path=[prefix], split="1,0,0", train_iters=2, mask_last_label=True, eod_mask_loss=True)
    train, _ = build_datasets(config)
    assert train is not None
    for index in range(len(train)):
        sample = train[index]
        expected = torch.from_numpy(bits)[sample["labels"]].float() * (sample["tokens"] != 3)
        expected[-1] = 0
        assert torch.equal(sample["loss_mask"], expected)


def test_a_start_says_which_tokens_count_and_how_many(tmp_path):
    prefix, bits = write_masked(tmp_path / "chats", LENGTHS)
    plain = tiny_data.numbered(tmp_path / "plain", 5, first=10_000)
    share = bits.mean()
    total = (bits.sum() + 200) / (len(bits) + 200)

    def line(**flags: object) -> str | None:
        return counted_tokens.describe_counted_tokens(data_config(split="1,1,0", **flags))

    assert line(data_path=[plain]) is None
    assert f"makes {share:.1%} of the tokens of --data-path; the others are context" in line(data_path=[prefix])
    both = line(data_path=[plain, prefix])
    assert f"makes {total:.1%} of the tokens of --data-path (plain 100.0%, chats {share:.1%})" in both
    weighted = line(data_path=["3", plain, "1", prefix])
    assert f"makes {(3 + share) / 4:.1%} of the tokens" in weighted
    apart = line(train_data_path=[prefix], valid_data_path=[plain])
    assert f"{share:.1%} of the tokens of --train-data-path and 100.0% of the tokens of --valid-data-path" in apart
    assert "every token counts" in line(data_path=[prefix], train_on_inputs=True)


def test_data_of_which_no_token_counts_is_refused(tmp_path, tokenizer_folder):
    assert preprocess_rows(tmp_path, tokenizer_folder, [CHATS["nobody answers"]] * 20) == 0
    flags = {"data_path": [str(tmp_path / "out_text_document")], "split": "1,1", "teacher": tokenizer_folder}
    with pytest.raises(ConfigError, match="No token of --data-path counts in the losses"):
        check_data(data_config(**flags), VOCABULARY)
    check_data(data_config(**flags, train_on_inputs=True), VOCABULARY)


def test_the_header_is_the_one_that_is_described():
    assert assistant_masks.HEADER.size == 32 and assistant_masks.MAGIC.decode() in "LRCMASK\0"
