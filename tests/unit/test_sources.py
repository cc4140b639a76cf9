"""Whatever kind of file documents come in, the dataset is the one that their JSON lines give."""

import bz2
import codecs
import datetime
import decimal
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest

import tiny_data
from megatron_lrc.config import ConfigError
from megatron_lrc.data import encoding
from megatron_lrc.data.encoding import read_chunks
from megatron_lrc.data.file_kinds import kind_of
from megatron_lrc.data.filters import parse_filter
from megatron_lrc.data.input_files import find_files
from megatron_lrc.data.records import as_text, parse_record
from megatron_lrc.data.restart import Position
from megatron_lrc.data.tables import check_table
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
        (tmp_path / name).write_bytes(b"x")
    inputs = [str(tmp_path / "z*"), str(tmp_path / "b"), str(tmp_path / "a.jsonl")]
    found = [str(Path(path).relative_to(tmp_path)) for path in find_files(inputs, print)]
    assert found == ["z.jsonl.zst", "b/1.txt.gz", "b/2.jsonl", "b/c/3.parquet", "a.jsonl"]
    assert kind_of("x.TXT.GZ") == ".txt" and kind_of("x.tar.gz") is None


def documents_in(path: Path, key: str = "text") -> list[bytes]:
    """The JSON lines of a file that is not divisible."""
    return [line for chunk in read_chunks([str(path)], [key]) for line in chunk.lines or []]


def write_packed(path: Path, parts: list[bytes]) -> None:
    """One packed stream for each part."""
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix.lower())
    if pack is None:
        write_zst(path, parts)
    else:
        path.write_bytes(b"".join(map(pack, parts)))


PACKED = [".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst", ".jsonl.zstd", ".JSONL.BZ2"]


@pytest.mark.parametrize("kind", PACKED)
def test_packed_files_of_several_streams_give_every_line_also_from_the_middle_on(tmp_path, kind):
    lines = json_lines(TEXTS)
    write_packed(path := tmp_path / f"a{kind}", [lines[:5000], b"", lines[5000:]])
    expected = lines.splitlines(keepends=True)
    assert documents_in(path) == expected
    (chunk,) = read_chunks([str(path)], ["text"], Position(lines=317))
    assert chunk.lines == expected[317:]


@pytest.mark.parametrize("kind", PACKED)
def test_a_packed_file_that_breaks_off_or_goes_on_as_something_else_is_named(tmp_path, kind):
    write_packed(path := tmp_path / f"a{kind}", [json_lines(TEXTS), json_lines(TEXTS[:3])])
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) * 2 // 3], whole[:-1], whole + b"more", b"\0" * 4 + whole):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="is damaged, or not packed as its name says"):
            documents_in(path)


@pytest.mark.parametrize("kind", [".jsonl.gz", ".txt.BZ2", ".jsonl.xz", ".zst"])
def test_a_packed_file_of_no_byte_is_a_failed_download(tmp_path, kind):
    """Packed nothing is some bytes; the readers of all packings take no byte for nothing."""
    (tmp_path / f"a{kind}").touch()
    with pytest.raises(ConfigError, match=f"a{kind} is damaged: it has no byte"):
        find_files([str(tmp_path / f"a{kind}")], print)


def test_empty_files_and_documents_are_counted(tmp_path, tokenizer_folder, capsys):
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).touch()
    tiny_data.write_jsonl(tmp_path / "c.jsonl", ["", "word1"])
    flags = ("--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "o")
    assert preprocess("--input", tmp_path / "*.jsonl", tmp_path / "b.txt", *flags) == 0
    printed = capsys.readouterr().out
    assert f"2 of 3 files without a byte, the first being {tmp_path}/a.jsonl\n" in printed
    assert "left out 2 empty documents of 'text'\n" in printed


def test_xz_files_may_be_padded_with_zeros_as_their_format_says(tmp_path):
    first, second = lzma.compress(b"one\n"), lzma.compress(b"two\n")
    (tmp_path / "a.jsonl.xz").write_bytes(first + b"\0" * 8 + second + b"\0" * 4)
    assert documents_in(tmp_path / "a.jsonl.xz") == [b"one\n", b"two\n"]


def found_in(folder: Path, *inputs: str) -> tuple[list[str], list[str]]:
    """(files, what was reported), all relative to the folder."""
    reported: list[str] = []
    files = find_files([str(folder / item) for item in inputs], reported.append)
    return [str(Path(path).relative_to(folder)) for path in files], reported


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")


def test_linked_folders_are_entered_but_not_for_ever(tmp_path):
    write_files(tmp_path, "in/a.jsonl", "elsewhere/deep/b.txt.bz2")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/deep/back").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere/deep/self").symlink_to(tmp_path / "elsewhere/deep")
    assert found_in(tmp_path, "in") == (["in/a.jsonl", "in/linked/deep/b.txt.bz2"], [])


def test_what_is_passed_over_in_folders_is_counted_by_suffix(tmp_path):
    write_files(tmp_path, "in/a.jsonl", "in/b.tar.GZ", "in/c.csv", "in/d.csv", "in/README", "in/x.parquet.gz")
    files, (line,) = found_in(tmp_path, "in")
    assert files == ["in/a.jsonl"]
    assert line.startswith("passed over: 5 files (.csv 2, ")
    assert all(part in line for part in (".tar.gz 1", "no suffix 1", ".parquet.gz 1"))
    (tmp_path / "in/a.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"the folder holds no .* file, but 5 files \(.csv 2, "):
        found_in(tmp_path, "in")


def test_folders_that_a_pattern_matches_are_read_with_all_below_them(tmp_path):
    write_files(tmp_path, "in/a.jsonl", "in/one/b.jsonl", "in/one/two/c.jsonl", "in/one/two/d.csv")
    below = ["in/a.jsonl", "in/one/b.jsonl", "in/one/two/c.jsonl"]
    files, (line,) = found_in(tmp_path, "in/*")
    assert files == below and "1 file (.csv 1)" in line
    assert found_in(tmp_path, "in/**") == (below, [line])


OTHER_KINDS = ["a.jsonl.lz4", "b.7z", "c.tar", "d.tar.gz", "e.CSV", "f.zip", "g.jsonl.part", "h.Z", "i.parquet.gz"]


def test_of_what_a_pattern_matches_files_of_other_kinds_are_passed_over(tmp_path):
    """A .tar of JSON lines has lines that parse, and half a download is half of its lines."""
    write_files(tmp_path, "in/a.jsonl", "in/b.unknown", *(f"in/{name}" for name in OTHER_KINDS))
    files, (line,) = found_in(tmp_path, "in/*")
    assert files == ["in/a.jsonl", "in/b.unknown"]
    assert line.startswith("passed over: 9 files (") and ".7z 1" in line
    with pytest.raises(ConfigError, match=r"\*.7z: it matches no .* file, but 1 file \(.7z 1\)"):
        found_in(tmp_path, "in/*.7z")


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_file_of_another_kind_is_refused_if_it_is_named(tmp_path, name):
    write_files(tmp_path, name)
    with pytest.raises(ConfigError, match=rf"{name} is (an?|packed|part) .*Unpack it, or write its documents"):
        found_in(tmp_path, name)


def test_hidden_files_and_folders_are_passed_over_unless_they_are_named(tmp_path):
    write_files(tmp_path, "in/a.jsonl", "in/.hidden.jsonl", "in/b/.cache/c.jsonl", "in/b/.cache/d.jsonl")
    for item in ("in", "in/*", "in/**"):
        files, reported = found_in(tmp_path, item)
        assert files == ["in/a.jsonl"], item
    (line,) = found_in(tmp_path, "in")[1]
    assert line.startswith("passed over: 2 files (hidden 2)")
    assert found_in(tmp_path, "in/.hidden.jsonl", "in/b/.cache") == (
        ["in/.hidden.jsonl", "in/b/.cache/c.jsonl", "in/b/.cache/d.jsonl"],
        [],
    )


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_that_is_meant_twice_by_a_link_is_refused(tmp_path, link):
    write_files(tmp_path, "a.jsonl")
    link(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    with pytest.raises(ConfigError, match=r"one file twice, by links: .*a.jsonl and .*b.jsonl"):
        found_in(tmp_path, "*.jsonl")
    with pytest.raises(ConfigError, match=r"one file twice, by links: .*b.jsonl and .*a.jsonl"):
        found_in(tmp_path, "b.jsonl", "a.jsonl")


def test_what_has_the_name_of_a_text_file_and_cannot_be_read_is_refused(tmp_path):
    write_files(tmp_path, "a.jsonl", "packed/p.parquet.gz")
    (tmp_path / "lost.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="lost.jsonl is a link to a file that is not there"):
        found_in(tmp_path, ".")
    (tmp_path / "lost.jsonl").rename(tmp_path / "lost")  # to a folder of documents, it may be
    with pytest.raises(ConfigError, match="lost is a link to a file that is not there"):
        found_in(tmp_path, ".")
    (tmp_path / "lost").rename(tmp_path / ".#a.jsonl")  # an editor's lock
    assert found_in(tmp_path, ".")[0] == ["a.jsonl"]
    with pytest.raises(ConfigError, match="p.parquet.gz is a packed parquet file, .* Unpack it"):
        found_in(tmp_path, "packed/p.parquet.gz")


def errors_of(path: Path) -> list[str]:
    (chunk,) = read_chunks([str(path)], ["text"])
    encoder = encoding.ChunkEncoder(keys=["text"], encode_batch=lambda texts: [[1] for _ in texts], vocab_size=2)
    return encoder(chunk).name_bad_lines(Position())


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, packing):
    mark = codecs.BOM_UTF8
    write = gzip.compress if packing else bytes
    (tmp_path / f"a.txt{packing}").write_bytes(write(mark + "caf\u00e9 \ufeff".encode()))
    assert [json.loads(line) for line in documents_in(tmp_path / f"a.txt{packing}")] == [{"text": "caf\u00e9 \ufeff"}]
    line = b'{"text": "x"}\n'
    (tmp_path / f"a.jsonl{packing}").write_bytes(write(mark + line + line + mark + line + mark))
    assert errors_of(tmp_path / f"a.jsonl{packing}") == []


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("encoding_name", ["UTF-16", "UTF-32"])
def test_other_encodings_are_named_by_their_mark(tmp_path, name, encoding_name):
    (tmp_path / name).write_bytes('{"text": "x"}'.encode(encoding_name))
    (error,) = errors_of(tmp_path / name)
    assert error.startswith(f"{tmp_path / name}:1: {encoding_name}, not UTF-8 (byte 0xff at column 1)")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("encoding_name", ["UTF-16-LE", "UTF-16-BE", "UTF-32-LE"])
def test_other_encodings_are_named_by_their_zeros(tmp_path, name, encoding_name):
    for text, reason in (("x", "it holds bytes that are 0"), ("\u00ff", "byte 0xff")):
        (tmp_path / name).write_bytes(f'{{"text": "{text}"}}'.encode(encoding_name))
        (error,) = errors_of(tmp_path / name)
        assert error.startswith(f"{tmp_path / name}:1: probably {encoding_name[:6]}, not UTF-8 ({reason}")
    (tmp_path / name).write_bytes(b'{"text": "a few zeros: \0"}')
    assert errors_of(tmp_path / name) == [f"{tmp_path / name}:1: not UTF-8 (it holds bytes that are 0)"]


def test_a_text_that_begins_with_a_byte_order_mark_is_the_same_of_every_kind_of_file(tmp_path):
    text = "\ufeffcaf\u00e9 \ufeff"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
    write_column(tmp_path / "a.parquet", [text])
    write_column(tmp_path / "b.parquet", [text.encode()])
    for name in ("a.txt", "a.jsonl.gz", "a.parquet", "b.parquet"):
        (line,) = documents_in(tmp_path / name)
        assert as_text(parse_record(line)["text"], "text", None) == "caf\u00e9 \ufeff", name


def test_a_json_document_over_the_whole_file_is_called_that(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x"}]))
    assert (
        "not an object; an object on each line is expected, not one JSON document" in errors_of(tmp_path / "a.json")[0]
    )
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x"}], indent=1))
    assert "; an object on each line is expected, not one JSON document" in errors_of(tmp_path / "a.json")[0]


def write_column(path: Path, values: list, arrow_type: str | None = None) -> Path:
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array(values, type=getattr(pyarrow, arrow_type)() if arrow_type else None)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    return path


@pytest.mark.parametrize("arrow_type", ["string", "large_string", "binary", "large_binary", "binary_view"])
def test_a_column_of_text_is_text_whether_it_is_annotated_or_not(tmp_path, arrow_type):
    values = [None, "caf\u00e9", "b'x'"]
    written = [value.encode() if value and "binary" in arrow_type else value for value in values]
    path = write_column(tmp_path / "a.parquet", written, arrow_type)
    assert [json.loads(line)["text"] for line in documents_in(path)] == values


def test_values_within_messages_are_decoded_too_and_ids_stay_numbers(tmp_path):
    chat = [{"role": "user", "content": "caf\u00e9".encode(), "n": 2**62, "calls": [{"x": b"y", "z": None}]}]
    path = write_column(tmp_path / "a.parquet", [chat])
    decoded = [{"role": "user", "content": "caf\u00e9", "n": 2**62, "calls": [{"x": "y", "z": None}]}]
    assert [json.loads(line) for line in documents_in(path)] == [{"text": decoded}]
    assert documents_in(write_column(tmp_path / "b.parquet", [[3, 1], []])) == [b'{"text": [3, 1]}', b'{"text": []}']


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_row_that_is_not_utf8_is_a_bad_line(tmp_path, is_chat):
    values: list = [b"fine", b"caf\xe9", b"fine"]
    if is_chat:
        values = [[{"role": "user", "content": value}] for value in values]
    path = write_column(tmp_path / "a.parquet", values)
    errors = [error for error in errors_of(path) if "chat template" not in error]
    assert errors == [f"{path} row 2: not UTF-8 (byte 0xe9 at column 4)"]


@pytest.mark.parametrize(
    "value, named",
    [
        (decimal.Decimal("1.5"), "'text' is of type decimal128(2, 1)"),
        (datetime.datetime(2024, 1, 2), "'text' is of type timestamp[us]"),
        (datetime.date(2024, 1, 2), "'text' is of type date32[day]"),
        (1, "'text' is of type int64"),
        (1.0, "'text' is of type double"),
        (True, "'text' is of type bool"),
        (None, "'text' is of type null"),
        ({"body": "x"}, "'text' is of type struct<body: string>"),
        (["x"], "'text' is of type list<"),
        ([1.5], "'text' is of type list<"),
        ([{"role": "user", "when": datetime.date(2024, 1, 2)}], "'text', field 'text.when', is of type date32[day]"),
        ([{"role": "user", "a": [{"b": decimal.Decimal("1.5")}]}], "field 'text.a.b', is of type decimal128(2, 1)"),
    ],
)
def test_a_column_of_another_type_is_refused_by_its_type(tmp_path, value, named):
    path = write_column(tmp_path / "a.parquet", [value])
    with pytest.raises(ConfigError) as caught:
        check_table(str(path), ["text"])
    assert str(caught.value).startswith(f"{path}: the column ") and named in str(caught.value)


def test_binary_of_a_fixed_size_is_told_which_binary_is_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": pa.array([b"abcd"], pa.binary(4))}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"type fixed_size_binary\[4\].* binary or large_binary \(of any length, not"):
        check_table(str(tmp_path / "a.parquet"), ["text"])


def test_columns_and_fields_of_the_same_name_are_refused(tmp_path):
    """pyarrow writes and reads them; by name neither is found (KeyError), and no dict holds both."""
    import pyarrow as pa
    import pyarrow.parquet

    path = str(tmp_path / "a.parquet")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "text", "body"])
    pyarrow.parquet.write_table(table, path)
    check_table(path, ["body"])
    for keys, filters in ((["text"], ()), (["body"], (parse_filter("text == a"),))):
        with pytest.raises(ConfigError, match=r"has 2 columns of the name 'text', .* Write the table again"):
            check_table(path, keys, filters)
    fields = [pa.field(name, pa.string()) for name in ("role", "content", "content")]
    messages = pa.StructArray.from_arrays([pa.array(["user"]), pa.array(["a"]), pa.array(["b"])], fields=fields)
    pyarrow.parquet.write_table(pa.table({"text": pa.ListArray.from_arrays([0, 1], messages)}), path)
    with pytest.raises(ConfigError, match=r"'text' is of type struct<.*> with several fields of one name"):
        check_table(path, ["text"])


def test_every_table_is_checked_before_the_first_is_read(tmp_path, tokenizer_folder, capsys):
    write_column(tmp_path / "a.parquet", ["fine"])
    write_column(tmp_path / "b.parquet", [1])
    flags = ("--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "o", "--log-interval", 1)
    assert preprocess("--input", tmp_path, *flags) == 2
    printed = capsys.readouterr()
    assert "b.parquet: the column 'text' is of type int64" in printed.err and printed.out == ""


@pytest.mark.parametrize("item, expected", [("none*.gz", "there is no such file"), ("folder", "the folder holds no")])
def test_an_input_that_means_no_file_is_refused(tmp_path, item, expected):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=expected):
        find_files([str(tmp_path / item)], print)


def test_a_file_that_is_meant_twice_is_refused(tmp_path):
    path = tiny_data.write_jsonl(tmp_path / "a.jsonl", ["x"])
    for again in (f"{tmp_path}", f"{tmp_path}/./a.jsonl", f"{tmp_path}//a.jsonl", os.path.relpath(path)):
        with pytest.raises(ConfigError, match="--input gives .*a.jsonl more than once"):
            find_files([path, again], print)


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
    assert "c.jsonl:2: the value of 'text' is a number" in capsys.readouterr().err


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    (chunk,) = encoding.read_chunks([str(path)], ["text"])
    path.write_text('{"text": "one"}\n')
    with pytest.raises(ConfigError, match="became shorter while it was read"):
        chunk.read()
