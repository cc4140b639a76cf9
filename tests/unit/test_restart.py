"""A data preparation that was stopped goes on, and comes out byte for byte as one that was not."""

import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny_data
from command_line import ROOT
from megatron_lrc.config import ConfigError
from megatron_lrc.data import encoding, indexing, restart
from megatron_lrc.data.writing import DatasetWriter
from preprocess_tool import file_names, preprocess

OUTPUT = {"o_text_document.bin", "o_text_document.idx", "o_text_document.json"}


@pytest.fixture
def corpus(tmp_path) -> list[Path]:
    """Plain, packed, table and text: each is gone on with in its own way."""
    from tiny_data import write_parquet, write_zst

    texts = tiny_data.make_texts(1200)
    plain = Path(tiny_data.write_jsonl(tmp_path / "1.jsonl", texts[:400]))
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    write_zst(tmp_path / "3.jsonl.zst", [plain.read_bytes()])
    write_parquet(tmp_path / "4.parquet", texts[400:])
    (tmp_path / "5.txt").write_text("word1 word2", encoding="utf-8")
    return sorted(tmp_path.glob("[1-5].*"))


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(restart, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 3000)


def options(corpus: list[Path], tokenizer_folder: str, folder: Path, **settings) -> indexing.IndexingOptions:
    return indexing.IndexingOptions(
        input=[str(path) for path in corpus],
        output_prefix=str(folder / "o"),
        tokenizer_model=tokenizer_folder,
        append_eod=True,
        log_interval=1,
        **settings,
    )


def stop_after(num_reports: int):
    """A `report` that interrupts."""
    seen = []

    def report(line: str) -> None:
        seen.append(line)
        if len(seen) >= num_reports:
            raise KeyboardInterrupt

    return report


def contents(folder: Path) -> dict[str, bytes]:
    assert file_names(folder) == OUTPUT
    return {name: (folder / name).read_bytes() for name in OUTPUT}


@pytest.fixture
def uninterrupted(corpus, tokenizer_folder, tmp_path) -> dict[str, bytes]:
    indexing.index_documents(options(corpus, tokenizer_folder, tmp_path / "whole"), report=lambda line: None)
    return contents(tmp_path / "whole")


def test_interrupted_at_every_chunk_it_comes_out_the_same(corpus, tokenizer_folder, tmp_path, uninterrupted):
    runs = 0
    is_done = False
    while not is_done:
        runs += 1
        try:
            settings = options(corpus, tokenizer_folder, tmp_path / "again")
            indexing.index_documents(settings, report=stop_after(7 if runs < 10 else 1000))
            is_done = True
        except KeyboardInterrupt:
            assert not file_names(tmp_path / "again") & OUTPUT  # nothing under a final name before all is there
    assert runs == 10
    assert contents(tmp_path / "again") == uninterrupted


def test_what_a_killed_process_left_behind_the_good_part_is_cut_off(corpus, tokenizer_folder, tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        indexing.index_documents(options(corpus, tokenizer_folder, tmp_path / "again"), report=stop_after(9))
    for suffix in ("bin", "lengths"):
        with open(tmp_path / "again" / f"o_text_document.{suffix}.partial", "ab") as file:
            file.write(b"xyz")
    (tmp_path / "again" / "o.unfinished.json.partial").write_text("{")
    lines: list[str] = []
    indexing.index_documents(options(corpus, tokenizer_folder, tmp_path / "again", workers=2), report=lines.append)
    assert lines[0].startswith("goes on after ") and lines[0].endswith(" documents that were done before")
    assert contents(tmp_path / "again") == uninterrupted


@pytest.mark.parametrize("num_renamed", [0, 1, 2, 3])
def test_stopped_between_two_renames_it_needs_only_the_others(
    corpus, tokenizer_folder, tmp_path, uninterrupted, monkeypatch, num_renamed
):
    renamed = []

    def rename(source: str, target: str, *, real=os.replace) -> None:
        if not target.endswith("unfinished.json"):
            if len(renamed) == num_renamed:
                raise KeyboardInterrupt
            renamed.append(target)
        real(source, target)

    settings = options(corpus, tokenizer_folder, tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", rename)
        if num_renamed == 3:
            patch.setattr(restart.Journal, "remove", stop_after(2))
        with pytest.raises(KeyboardInterrupt):
            indexing.index_documents(settings, report=lambda line: None)
    indexing.index_documents(settings, report=lambda line: None)
    assert contents(tmp_path / "again") == uninterrupted


@pytest.mark.parametrize("change", ["options", "source", "damaged"])
def test_what_was_made_otherwise_is_not_gone_on_with(corpus, tokenizer_folder, tmp_path, uninterrupted, change):
    with pytest.raises(KeyboardInterrupt):
        other = options(corpus, tokenizer_folder, tmp_path / "again")
        indexing.index_documents(other, report=stop_after(9))
    settings = options(corpus, tokenizer_folder, tmp_path / "again")
    if change == "options":
        settings = indexing.IndexingOptions(**{**vars(settings), "append_eod": False})
    elif change == "source":
        os.utime(corpus[0], ns=(1, 1))
    else:
        (tmp_path / "again" / "o.unfinished.json").write_text('{"identity": ')
    lines: list[str] = []
    indexing.index_documents(settings, report=lines.append)
    assert not lines[0].startswith("goes on")
    assert (contents(tmp_path / "again") == uninterrupted) == (change != "options")


def test_a_bad_line_late_in_the_corpus_loses_nothing(corpus, tokenizer_folder, tmp_path, uninterrupted):
    spoiled = tmp_path / "6.jsonl"
    spoiled.write_text('{"text": \n')
    settings = options([*corpus, spoiled], tokenizer_folder, tmp_path / "again")
    with pytest.raises(ConfigError, match="6.jsonl:1: not valid JSON"):
        indexing.index_documents(settings, report=lambda line: None)
    lines: list[str] = []
    skipping = indexing.IndexingOptions(**{**vars(settings), "on_bad_line": "skip"})
    indexing.index_documents(skipping, report=lines.append)
    assert lines[0].startswith("goes on after 2,0")
    found = contents(tmp_path / "again")
    assert found["o_text_document.bin"] == uninterrupted["o_text_document.bin"]
    assert json.loads(found["o_text_document.json"])["bad_lines"] == 1


def test_two_processes_do_not_write_the_same_dataset(tmp_path):
    first = DatasetWriter(str(tmp_path / "o"), 300)
    with pytest.raises(ConfigError, match="is being written by another process"):
        DatasetWriter(str(tmp_path / "o"), 300)
    first.discard()
    assert file_names(tmp_path) == set()


@pytest.mark.slow
def test_killed_at_random_moments_it_comes_out_the_same(tmp_path, tokenizer_folder):
    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", tiny_data.make_texts(15000))
    flags = ("--input", source, "--tokenizer-model", tokenizer_folder, "--append-eod", "--output-prefix")
    assert preprocess(*flags, tmp_path / "whole" / "o") == 0
    program = (
        "import sys; from megatron_lrc.commands.main import main; from megatron_lrc.data import encoding, restart;"
        "restart.SECONDS_BETWEEN = 0.0; encoding.CHUNK_BYTES = 50000;"
        "sys.exit(main(['preprocess', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", program, *map(str, flags), str(tmp_path / "again" / "o"), "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    generator, kills = random.Random(4), 0
    journal = tmp_path / "again" / "o.unfinished.json"
    while True:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        before = journal.stat().st_mtime_ns if journal.exists() else None
        while process.poll() is None and (journal.stat().st_mtime_ns if journal.exists() else None) == before:
            time.sleep(0.005)  # until it has done something
        if kills < 4:
            time.sleep(generator.uniform(0.0, 0.1))
            process.kill()
        if process.wait(timeout=60) == 0:
            break
        kills += 1
    assert kills >= 2
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_workers_end_when_their_parent_is_killed(tmp_path, tokenizer_folder):
    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", tiny_data.make_texts(30000))
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", source, "--workers", "2"]
    command += [
        "--tokenizer-model",
        str(tokenizer_folder),
        "--output-prefix",
        str(tmp_path / "o"),
        "--log-interval",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None and process.stdout.readline()  # the workers are at work
    process.kill()
    process.communicate(timeout=30)  # returns when the last process that holds stdout has ended
