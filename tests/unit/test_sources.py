"""Whatever kind of file documents come in, the dataset is the one that their JSON lines give."""

import gzip
import json
from pathlib import Path

import pytest

import tiny_data
from megatron_lrc.config import ConfigError
from megatron_lrc.data import encoding
from megatron_lrc.data.encoding import read_chunks
from megatron_lrc.data.input_files import find_files, kind_of
from megatron_lrc.data.tokenizers import load_tokenizer
from preprocess_tool import check_refused, preprocess
from tiny_data import read_documents, write_parquet, write_zst

TEXTS = tiny_data.make_texts(400)


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts)).encode()


def write_as(folder: Path, kind: str) -> Path:
    """TEXTS in a file (or, of plain text, in a folder of files) of this kind."""
    path, lines = folder / f"corpus{kind}", json_lines(TEXTS)
    if kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines[:5000]) + gzip.compress(lines[5000:]))
    elif kind == ".jsonl.zst":
        write_zst(path, [lines[:5000], lines[5000:]])
    elif kind == ".parquet":
        write_parquet(path, TEXTS)
    elif kind == ".txt":
        path = folder / "texts" / "deep"
        path.mkdir(parents=True)
        for number, text in enumerate(TEXTS):
            (path / f"{number:03}.txt").write_text(text, encoding="utf-8")
        (path / "notes.md").write_text("no document")
        return folder / "texts"
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize(
    "kind, workers",
    [(kind, 1) for kind in (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt", ".anything")]
    + [(".jsonl.zst", 2), (".parquet", 2)],
)
def test_every_kind_of_file_gives_the_same_dataset(tmp_path, tokenizer_folder, kind, workers):
    flags = ("--tokenizer-model", tokenizer_folder, "--append-eod", "--workers", workers, "--output-prefix")
    plain = tiny_data.write_jsonl(tmp_path / "plain.jsonl", TEXTS)
    assert preprocess("--input", plain, *flags, tmp_path / "plain") == 0
    assert preprocess("--input", write_as(tmp_path, kind), *flags, tmp_path / "other") == 0
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"other_text_document{suffix}").read_bytes() == (
            tmp_path / f"plain_text_document{suffix}"
        ).read_bytes()
    assert len(read_documents(tmp_path / "other_text_document")) == len(TEXTS)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_the_share_done_is_counted_on_disk_and_ends_at_all_of_it(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("megatron_lrc.data.encoding.CHUNK_BYTES", 2000)
    path = write_as(tmp_path, kind)
    shares = [chunk.disk_bytes for chunk in read_chunks([str(path)], ["text"])]
    assert len(shares) > 5 and min(shares) >= 0 and sum(shares) == path.stat().st_size


def test_folders_and_patterns_are_sorted_and_keep_their_place(tmp_path):
    for name in ("b/2.jsonl", "b/1.txt.gz", "b/c/3.parquet", "b/README", "a.jsonl", "z.jsonl.zst", "b/4.parquet.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    inputs = [str(tmp_path / "z*"), str(tmp_path / "b"), str(tmp_path / "a.jsonl")]
    found = [str(Path(path).relative_to(tmp_path)) for path in find_files(inputs, print)]
    assert found == ["z.jsonl.zst", "b/1.txt.gz", "b/2.jsonl", "b/c/3.parquet", "a.jsonl"]
    assert kind_of("x.TXT.GZ") == ".txt" and kind_of("x.tar.gz") is None


@pytest.mark.parametrize("item, expected", [("none*.gz", "there is no such file"), ("folder", "the folder holds no")])
def test_an_input_that_means_no_file_is_refused(tmp_path, item, expected):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=expected):
        find_files([str(tmp_path / item)], print)


def test_a_file_that_is_meant_twice_is_refused(tmp_path):
    path = tiny_data.write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(ConfigError, match="more than once"):
        find_files([path, str(tmp_path)], print)


def test_damaged_files_are_one_sentence_and_leave_nothing(tmp_path, tokenizer_folder, capsys):
    flags = ("--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "out")
    for kind, message in (
        (".jsonl.gz", "is damaged"),
        (".jsonl.zst", "is damaged"),
        (".parquet", "a parquet file"),
    ):
        path = write_as(tmp_path, kind)
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) * 2 // 3], whole[:-1], b"\x00" * 4 + whole[4:-4] + b"\x00" * 4):
            path.write_bytes(damaged)
            check_refused(capsys, message, "--input", path, *flags)
    (tmp_path / "latin.txt").write_bytes("na\u00efve".encode("latin-1"))
    check_refused(capsys, "latin.txt:1: not UTF-8 (byte 0xef", "--input", tmp_path / "latin.txt", *flags)
    write_parquet(tmp_path / "named.parquet", TEXTS[:3])
    check_refused(capsys, "has no column 'body'", "--input", tmp_path / "named.parquet", *flags, "--json-keys", "body")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_parts_of_files_are_whole_lines_and_bad_ones_are_named_by_file_and_line(
    tmp_path,
    tokenizer_folder,
    monkeypatch,
    capsys,
    workers,
):
    """Plain files are divided by bytes; who reads a part does not know how many lines come before it."""
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 64)
    texts = [f"word{number % 7} " * (number % 11) for number in range(200)]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[150] = "{"
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines))  # no newline at its end
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.jsonl").write_text("\n\n" + json.dumps({"text": "word1"}) + "\n" + "{" + "\n\n")
    flags = ["--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"]
    flags += ["--tokenizer-model", tokenizer_folder, "--workers", workers, "--output-prefix", tmp_path / "out"]
    assert preprocess(*flags) == 2
    assert "a.jsonl:151: not valid JSON" in capsys.readouterr().err
    assert preprocess(*flags, "--on-bad-line", "skip") == 0
    expected = load_tokenizer(tokenizer_folder).encode_batch([*texts[:150], *texts[151:], "word1"])
    assert read_documents(tmp_path / "out_text_document") == [ids for ids in expected if ids]
    chunks = list(encoding.read_chunks([str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl")], ["text"]))
    assert len(chunks) > 50 and [chunk.source[-7:] for chunk in chunks if chunk.is_last] == [
        "a.jsonl",
        "b.jsonl",
        "c.jsonl",
    ]
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "word1"}) + "\n" + json.dumps({"text": 1}) + "\n")
    assert preprocess("--input", tmp_path / "b.jsonl", tmp_path / "c.jsonl", *flags[4:]) == 2
    assert "c.jsonl:2: the value of 'text' is a int" in capsys.readouterr().err


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    (chunk,) = encoding.read_chunks([str(path)], ["text"])
    path.write_text('{"text": "one"}\n')
    with pytest.raises(ConfigError, match="became shorter while it was read"):
        chunk.read()
