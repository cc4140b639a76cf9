"""A disk that is full costs one sentence and nothing else: with room made, the same command gives the same bytes."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_data
from command_line import ROOT
from megatron_lrc.data import encoding, restart
from preprocess_tool import file_names, preprocess
from small_disks import PAGE, fill_disk
from tools_path import tool_main

merge_datasets = tool_main("merge_datasets")

FINAL = {"o_text_document.bin", "o_text_document.idx", "o_text_document.json"}
needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@pytest.fixture
def source(tmp_path) -> str:
    return tiny_data.write_jsonl(tmp_path / "a.jsonl", tiny_data.make_texts(800))


def often(monkeypatch) -> None:
    monkeypatch.setattr(restart, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 20_000)


def prepare(source: str, tokenizer_folder: str, folder: Path) -> int:
    flags = ("--input", source, "--tokenizer-model", tokenizer_folder, "--append-eod", "--output-prefix", folder / "o")
    return preprocess(*flags)


def prepared(source: str, tokenizer_folder: str, folder: Path) -> dict[str, bytes]:
    assert prepare(source, tokenizer_folder, folder) == 0
    assert file_names(folder) == FINAL
    return {name: (folder / name).read_bytes() for name in FINAL}


def check_sentence(error: str, tool: str, folder: Path) -> None:
    assert error.startswith(f"{tool}: No space left on device: {folder}" if "the files of" not in error else tool)
    assert error.count("\n") == 1 and "Errno" not in error and "Traceback" not in error
    assert f"Make room in {folder}, or use another --output-prefix" in error


def test_a_disk_full_at_any_page_costs_one_sentence_and_no_byte(
    source, tokenizer_folder, tmp_path, small_disk, monkeypatch, capsys
):
    often(monkeypatch)
    whole = prepared(source, tokenizer_folder, tmp_path / "whole")
    stages = set()
    num_continued, free, exit_code = 0, 0, 2
    while exit_code == 2:
        ballast = fill_disk(small_disk, free)
        capsys.readouterr()
        exit_code = prepare(source, tokenizer_folder, small_disk)
        if exit_code == 2:
            check_sentence(capsys.readouterr().err, "preprocess_data.py", small_disk)
            assert not file_names(small_disk) & FINAL
            stages |= file_names(small_disk)
        ballast.unlink()
        assert prepared(source, tokenizer_folder, small_disk) == whole
        num_continued += "goes on after" in capsys.readouterr().out
        for name in FINAL:
            (small_disk / name).unlink()
        free += PAGE
    assert exit_code == 0 and free > sum(map(len, whole.values()))
    assert {f"o_text_document.{suffix}.partial" for suffix in ("bin", "lengths", "idx", "json")} <= stages
    assert "o.unfinished.json.partial" in stages and num_continued > 5


@needs_dev_full
@pytest.mark.parametrize("name", ["o_text_document.idx", "o_text_document.json"])
def test_an_index_or_manifest_that_finds_no_room_costs_one_sentence(
    source, tokenizer_folder, tmp_path, monkeypatch, capsys, name
):
    often(monkeypatch)
    whole = prepared(source, tokenizer_folder, tmp_path / "whole")
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / f"{name}.partial").symlink_to("/dev/full")
    capsys.readouterr()
    assert prepare(source, tokenizer_folder, folder) == 2
    check_sentence(capsys.readouterr().err, "preprocess_data.py", folder)
    assert not file_names(folder) & FINAL
    (folder / f"{name}.partial").unlink(missing_ok=True)
    assert prepared(source, tokenizer_folder, folder) == whole


def test_a_bin_that_may_not_grow_costs_one_sentence(source, tokenizer_folder, tmp_path):
    whole = prepared(source, tokenizer_folder, tmp_path / "whole")
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", source, "--append-eod"]
    command += ["--tokenizer-model", tokenizer_folder, "--output-prefix", str(tmp_path / "small" / "o")]
    most = len(whole["o_text_document.bin"]) // 2
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == f"preprocess_data.py: the files of {tmp_path}/small/o: File too large.\n"
    assert not file_names(tmp_path / "small") & FINAL
    assert prepared(source, tokenizer_folder, tmp_path / "small") == whole


def merge(inputs: list[str], output: Path) -> int:
    return merge_datasets(["--input", *inputs, "--output-prefix", str(output)])


def test_a_merge_onto_a_full_disk_costs_one_sentence_at_any_page(
    source, tokenizer_folder, tmp_path, small_disk, capsys
):
    prepared(source, tokenizer_folder, tmp_path / "in")
    inputs = [str(tmp_path / "in" / "o_text_document")] * 2
    assert merge(inputs, tmp_path / "whole") == 0
    free, exit_code = 0, 2
    while exit_code == 2:
        ballast = fill_disk(small_disk, free)
        capsys.readouterr()
        exit_code = merge(inputs, small_disk / "all")
        if exit_code == 2:
            check_sentence(capsys.readouterr().err, "merge_datasets.py", small_disk)
            assert file_names(small_disk) == {"ballast"}
        ballast.unlink()
        free += PAGE
    assert exit_code == 0
    size = 0
    for suffix in (".bin", ".idx", ".json"):
        expected = (tmp_path / f"whole{suffix}").read_bytes()
        assert (small_disk / f"all{suffix}").read_bytes() == expected
        size += len(expected)
    assert free > size


@needs_dev_full
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_a_merged_file_that_finds_no_room_costs_one_sentence(source, tokenizer_folder, tmp_path, capsys, suffix):
    prepared(source, tokenizer_folder, tmp_path / "in")
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / f"all{suffix}.tmp-{os.getpid()}").symlink_to("/dev/full")
    capsys.readouterr()
    assert merge([str(tmp_path / "in" / "o_text_document")] * 2, folder / "all") == 2
    check_sentence(capsys.readouterr().err, "merge_datasets.py", folder)
    assert file_names(folder) == set()
