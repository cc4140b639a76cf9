"""tools/merge_datasets.py: the inputs end to end, byte for byte as megatron-core's builder joins them, or nothing."""

import json
import os
from pathlib import Path

import numpy
import pytest

import tiny_data
from megatron_lrc.config import ConfigError
from megatron_lrc.data import indexed_files, merging
from megatron_lrc.data.indexed_files import read_indexed_file
from megatron_lrc.data.writing import DatasetWriter
from preprocess_tool import file_names
from tiny_data import read_documents, write_sequences
from tools_path import tool_main

merge_datasets = tool_main("merge_datasets")
preprocess_data = tool_main("preprocess_data")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> list[str]:
    """Prefixes of three datasets of one tokenizer, with manifests."""
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = tiny_data.write_tokenizer(folder / "tokenizer")
    for number, name in enumerate("abc"):
        source = tiny_data.write_jsonl(folder / f"{name}.jsonl", [*tiny_data.make_texts(10 + number, seed=number), ""])
        flags = ["--input", source, "--tokenizer-model", tokenizer, "--output-prefix", str(folder / name)]
        assert preprocess_data(flags) == 0
    return [str(folder / f"{name}_text_document") for name in "abc"]


def merge(inputs: list[str], output: Path) -> int:
    return merge_datasets(["--input", *inputs, "--output-prefix", str(output)])


def test_documents_of_all_inputs_follow_in_order_with_a_merged_manifest(prepared, tmp_path):
    assert merge(prepared, tmp_path / "new" / "all") == 0
    expected = [document for prefix in prepared for document in read_documents(prefix)]
    assert read_documents(tmp_path / "new" / "all") == expected
    assert file_names(tmp_path / "new") == {"all.bin", "all.idx", "all.json"}
    manifest = read_indexed_file(str(tmp_path / "new" / "all")).manifest
    manifests = [json.loads(Path(f"{prefix}.json").read_text()) for prefix in prepared]
    assert manifest is not None
    assert manifest["tokenizer"] == manifests[0]["tokenizer"]
    assert (manifest["documents"], manifest["tokens"]) == (33, sum(map(len, expected)))
    assert manifest["empty_documents"] == 3
    assert manifest["sources"] == [source for each in manifests for source in each["sources"]]
    assert manifest["options"] == manifests[0]["options"]
    assert [part["prefix"] for part in manifest["merged"]] == prepared
    assert indexed_files.read_index(str(tmp_path / "new" / "all")).num_documents == 33


@pytest.mark.parametrize("piece", [3, 1 << 22])
def test_files_equal_those_of_megatron_cores_builder(tmp_path, monkeypatch, piece):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    monkeypatch.setattr(indexed_files, "_PIECE", piece)
    generator = numpy.random.default_rng(1)
    prefixes = []
    for number in range(3):
        documents = [
            [
                generator.integers(1 << 30, size=generator.integers(1, 6)).tolist()
                for _ in range(generator.integers(1, 4))
            ]
            for _ in range(8)
        ]
        prefixes.append(write_sequences(tmp_path / f"in{number}", documents))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=numpy.int32)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert merge(prefixes, tmp_path / "ours") == 0
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    merged, originals = IndexedDataset(str(tmp_path / "ours")), [IndexedDataset(prefix) for prefix in prefixes]
    sequences = [original[number].tolist() for original in originals for number in range(len(original))]
    assert len(merged.document_indices) == 25 < len(sequences)
    assert [merged[number].tolist() for number in range(len(merged))] == sequences


def test_another_dtype_is_refused(tmp_path, capsys):
    narrow = tiny_data.write_dataset(tmp_path / "narrow", [[1, 2]])
    wide = tiny_data.write_dataset(tmp_path / "wide", [[1, 2]], dtype=numpy.int32)
    assert merge([narrow, wide], tmp_path / "all") == 2
    err = capsys.readouterr().err
    assert "narrow holds uint16 token ids and" in err and "wide int32" in err and err.count("\n") == 1
    assert not list(tmp_path.glob("all*"))


def test_another_tokenizer_is_refused_also_past_an_input_without_manifest(prepared, tmp_path, capsys):
    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", tiny_data.make_texts(3))
    other = tiny_data.write_tokenizer(tmp_path / "other", words=["apple", "pear"])
    assert preprocess_data(["--input", source, "--tokenizer-model", other, "--output-prefix", str(tmp_path / "o")]) == 0
    bare = tiny_data.write_dataset(tmp_path / "bare", [[1, 2]])
    assert merge([bare, prepared[0], str(tmp_path / "o_text_document")], tmp_path / "all") == 2
    err = capsys.readouterr().err
    assert "was made with the tokenizer" in err and other in err and err.count("\n") == 1
    assert not list(tmp_path.glob("all*"))


def test_an_input_without_manifest_leaves_the_result_without_one_and_says_so(prepared, tmp_path, capsys):
    bare = tiny_data.write_dataset(tmp_path / "bare", [[1, 2]])
    (tmp_path / "all.json").write_text("an older dataset's")
    assert merge([prepared[0], bare], tmp_path / "all") == 0
    assert f"no manifest was written: {bare}.json does not exist" in capsys.readouterr().out
    assert read_documents(tmp_path / "all") == [*read_documents(prepared[0]), [1, 2]]
    assert not (tmp_path / "all.json").exists()


def test_a_damaged_input_is_named_and_nothing_written(prepared, tmp_path, capsys):
    bad = tiny_data.write_dataset(tmp_path / "bad", [[1, 2], [3, 4]])
    index = bytearray(Path(f"{bad}.idx").read_bytes())
    index[34 + 8] ^= 2  # the first pointer
    Path(f"{bad}.idx").write_bytes(index)
    assert merge([prepared[0], bad], tmp_path / "all") == 2
    assert f"{bad}.idx points to byte 2 for sequence 0" in capsys.readouterr().err
    assert not list(tmp_path.glob("all*"))


def test_an_input_is_not_overwritten(prepared, tmp_path, capsys):
    bare = tiny_data.write_dataset(tmp_path / "bare", [[1, 2]])
    os.symlink(tmp_path, tmp_path / "link")
    assert merge([bare, bare], tmp_path / "link" / "bare") == 2
    assert "is one of the inputs" in capsys.readouterr().err
    assert read_documents(bare) == [[1, 2]]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_merge_that_fails_late_leaves_the_older_dataset_and_no_other_file(tmp_path, monkeypatch, capsys, error):
    first = tiny_data.write_dataset(tmp_path / "first", [[1, 2]])
    output = tiny_data.write_dataset(tmp_path / "all", [[9]])
    before = file_names(tmp_path)

    def fail(indexes, output):
        raise error

    monkeypatch.setattr(merging, "write_index", fail)
    assert merge([first, first], tmp_path / "all") == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert file_names(tmp_path) == before
    assert read_documents(output) == [[9]]
    err = capsys.readouterr().err
    assert ("interrupted" if isinstance(error, KeyboardInterrupt) else "No space left on device") in err


def test_an_input_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    prefix = tiny_data.write_dataset(tmp_path / "a", [[1, 2], [3]])
    index = indexed_files.read_index(prefix)
    Path(f"{prefix}.bin").write_bytes(b"\x01\x00")
    changed = pytest.raises(ConfigError, match=r"a\.bin changed while it was read: 2 bytes instead of 6")
    with open(tmp_path / "out", "wb") as output, changed:
        merging.copy_tokens(index, output)


def test_inputs_made_with_different_options_are_merged_and_said(prepared, tmp_path, capsys):
    folder = Path(prepared[0]).parent
    source, tokenizer = str(folder / "a.jsonl"), str(folder / "tokenizer")
    flags = ["--input", source, "--tokenizer-model", tokenizer, "--output-prefix", str(tmp_path / "e"), "--append-eod"]
    assert preprocess_data(flags) == 0
    assert merge([prepared[0], str(tmp_path / "e_text_document")], tmp_path / "all") == 0
    assert "different options" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "all.json").read_text())
    assert manifest["options"] is None
    assert [part["options"]["append_eod"] for part in manifest["merged"]] == [False, True]


def test_a_merge_waits_for_nobody_who_writes_the_same_dataset(prepared, tmp_path, capsys):
    writer = DatasetWriter(str(tmp_path / "all"), 300)
    assert merge(prepared, tmp_path / "all") == 2
    assert f"{tmp_path / 'all'} is being written by another process" in capsys.readouterr().err
    writer.discard()
    assert merge(prepared, tmp_path / "all") == 0
    assert file_names(tmp_path) == {"all.bin", "all.idx", "all.json"}
