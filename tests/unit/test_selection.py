"""Which rows become documents: filters, samples and caps, of JSON lines and tables alike, however work is divided."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_data
from megatron_lrc.data import encoding, indexing, restart
from megatron_lrc.data.filters import parse_filter
from megatron_lrc.data.indexed_files import read_index
from megatron_lrc.data.inspection import describe
from megatron_lrc.data.preparation import IndexingOptions
from megatron_lrc.data.selection import Selection
from megatron_lrc.data.tokenizers import load_tokenizer
from preprocess_tool import check_refused, preprocess
from tiny_data import read_documents

NUM_ROWS = 700
TEXTS = tiny_data.make_texts(NUM_ROWS)
#: As FineWeb-Edu's rows are; some have no score.
ROWS = [
    {
        "text": text,
        "int_score": None if number % 50 == 0 else number % 6,
        "score": number % 60 / 10,
        "language": ("en", "de", "fr")[number % 3],
        "url": "x",
    }
    for number, text in enumerate(TEXTS)
]


def is_wanted(row: dict[str, Any]) -> bool:
    return row["int_score"] is not None and row["int_score"] >= 4 and row["language"] in ("en", "fr")


FILTERS = ("--filter", "int_score >= 4", "--filter", "language in [en, fr]")
WANTED = [row["text"] for row in ROWS if is_wanted(row)]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(ROWS)
    table = table.set_column(3, "language", table["language"].dictionary_encode())
    pyarrow.parquet.write_table(table, path, row_group_size=90)


WRITERS = {".jsonl": write_jsonl, ".jsonl.gz": write_gzip, ".parquet": write_parquet}


@pytest.fixture(params=WRITERS)
def corpus(request, tmp_path) -> Path:
    path = tmp_path / f"rows{request.param}"
    WRITERS[request.param](path)
    return path


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 3000)


def manifest_of(prefix: Path) -> dict[str, Any]:
    return json.loads(Path(f"{prefix}_text_document.json").read_text())


def ids_of(tokenizer_folder: str, texts: list[str]) -> list[list[int]]:
    return load_tokenizer(tokenizer_folder).encode_batch(texts)


def test_rows_that_meet_all_filters_are_taken_and_the_manifest_says_so(corpus, tokenizer_folder, tmp_path, capsys):
    flags = ("--input", corpus, "--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "o")
    assert preprocess(*flags, *FILTERS) == 0
    assert read_documents(tmp_path / "o_text_document") == ids_of(tokenizer_folder, WANTED)
    manifest = manifest_of(tmp_path / "o")
    assert manifest["rows"] == {"kept": len(WANTED), "filtered": NUM_ROWS - len(WANTED), "not_sampled": 0}
    assert manifest["options"]["filters"] == ["int_score >= 4", "language in [en, fr]"]
    assert f"kept {len(WANTED)} rows; filters left out {NUM_ROWS - len(WANTED)}, sampling 0" in capsys.readouterr().out


def test_a_row_that_cannot_be_compared_is_a_bad_line_with_its_number(tokenizer_folder, tmp_path, capsys):
    source = tmp_path / "a.jsonl"
    source.write_text(
        '{"text": "word1", "s": 5}\n{"text": 7, "s": 1}\n{"text": "word2", "s": "5"}\n{"text": "word3"}\n'
    )
    flags = ("--input", source, "--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "o")
    assert preprocess(*flags, "--filter", "s >= 4") == 2
    assert f"{source}:3: the value of 's' is text" in capsys.readouterr().err  # of row 2 the text is not looked at
    assert preprocess(*flags, "--filter", "s >= 4", "--on-bad-line", "skip") == 0
    assert read_documents(tmp_path / "o_text_document") == ids_of(tokenizer_folder, ["word1"])
    manifest = manifest_of(tmp_path / "o")
    assert (manifest["rows"], manifest["bad_lines"]) == ({"kept": 1, "filtered": 1, "not_sampled": 0}, 2)


def test_what_can_be_seen_before_reading_is_refused_then(tokenizer_folder, tmp_path, capsys):
    write_parquet(tmp_path / "rows.parquet")
    (tmp_path / "a.txt").write_text("word1")
    flags = ("--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "o")
    table = (*flags, "--input", tmp_path / "rows.parquet")
    check_refused(capsys, "has no column 'quality', which --filter 'quality > 1'", *table, "--filter", "quality > 1")
    check_refused(capsys, "is of type int64, which --filter 'int_score == '4''", *table, "--filter", "int_score == '4'")
    check_refused(capsys, "which --filter 'language > 3' cannot compare", *table, "--filter", "language > 3")
    check_refused(capsys, "is no condition", *table, "--filter", "language")
    check_refused(capsys, "--sample-fraction 0.0 is no share", *table, "--sample-fraction", 0)
    check_refused(capsys, "--max-tokens 5X is no number of tokens", *table, "--max-tokens", "5X")
    check_refused(capsys, "gives several", *table, "--max-tokens", 5, "--json-keys", "text", "url")
    check_refused(capsys, "which has no column", *flags, "--input", tmp_path / "a.txt", "--filter", "x > 1")
    check_refused(capsys, f"--filter left out {NUM_ROWS} and", *table, "--filter", "int_score > 9")


def test_a_damaged_text_in_a_table_that_is_filtered_out_does_no_harm(tokenizer_folder, tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    columns = {"text": [b"word1", b"\xff", b"word2"], "language": [b"en", b"de", b"\xff"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    flags = ("--input", tmp_path / "rows.parquet", "--tokenizer-model", tokenizer_folder)
    flags = (*flags, "--filter", "language == en", "--output-prefix", tmp_path / "o")
    assert preprocess(*flags) == 2
    assert "rows.parquet row 3: not UTF-8" in capsys.readouterr().err
    assert preprocess(*flags, "--on-bad-line", "skip") == 0
    assert read_documents(tmp_path / "o_text_document") == ids_of(tokenizer_folder, ["word1"])


def test_a_sample_is_the_same_of_every_kind_of_file_and_a_smaller_one_is_part_of_it(tokenizer_folder, tmp_path):
    samples = {}
    for suffix, write in WRITERS.items():
        write(tmp_path / f"rows{suffix}")
        flags = ("--input", tmp_path / f"rows{suffix}", "--tokenizer-model", tokenizer_folder, "--append-eod")
        assert preprocess(*flags, "--sample-fraction", 0.3, "--output-prefix", tmp_path / suffix) == 0
        samples[suffix] = read_documents(tmp_path / f"{suffix}_text_document")
    assert samples[".jsonl"] == samples[".jsonl.gz"] == samples[".parquet"]
    manifest = manifest_of(tmp_path / ".jsonl")
    taken = len(samples[".jsonl"])
    assert manifest["rows"] == {"kept": taken, "filtered": 0, "not_sampled": NUM_ROWS - taken}
    assert (manifest["options"]["sample_fraction"], manifest["options"]["sample_seed"]) == (0.3, 0)

    def taken_by(fraction: float, seed: int = 0) -> set[str]:
        selection = Selection(sample_fraction=fraction, sample_seed=seed)
        return {text for text in map(str, range(4000)) if selection.is_sampled([text])}

    assert taken_by(0.1) < taken_by(0.3) and 300 < len(taken_by(0.1)) < 500
    assert len(taken_by(0.1) & taken_by(0.1, seed=1)) < 80  # 40 by chance


def expected_up_to(documents: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Up to the document by which there are this many."""
    taken: list[list[int]] = []
    while sum(map(len, taken)) < num_tokens:
        taken.append(documents[len(taken)])
    return taken


@pytest.mark.parametrize("workers", [1, 2])
def test_the_cap_is_exact_to_the_document_that_reaches_it(tokenizer_folder, tmp_path, workers, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl")
    every = [[*ids, 1] for ids in ids_of(tokenizer_folder, WANTED)]
    third = sum(map(len, every[:40]))
    flags = ("--input", tmp_path / "rows.jsonl", "--tokenizer-model", tokenizer_folder, "--append-eod", *FILTERS)
    for cap in (third - 1, third, third + 1) if workers == 1 else (third,):
        folder = tmp_path / str(cap)
        assert preprocess(*flags, "--max-tokens", cap, "--workers", workers, "--output-prefix", folder / "o") == 0
        assert read_documents(folder / "o_text_document") == expected_up_to(every, cap)
    manifest = manifest_of(tmp_path / str(third) / "o")
    assert (manifest["tokens"], manifest["options"]["max_tokens"], manifest["rows"]["kept"]) == (third, third, 40)
    last_taken = ROWS.index(next(row for row in ROWS if row["text"] == WANTED[39]))
    assert sum(manifest["rows"].values()) == last_taken + 1  # what follows in the chunk was not read


def test_inspection_shows_what_was_left_out(tokenizer_folder, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl")
    flags = ("--input", tmp_path / "rows.jsonl", "--tokenizer-model", tokenizer_folder, *FILTERS)
    assert preprocess(*flags, "--sample-fraction", 0.5, "--max-tokens", "1K", "--output-prefix", tmp_path / "o") == 0
    rows = manifest_of(tmp_path / "o")["rows"]
    shown = describe(read_index(str(tmp_path / "o_text_document")))
    assert shown[-2:] == [
        f"rows         {rows['kept']} kept, {rows['filtered']} left out by int_score >= 4, language in [en, fr], "
        f"{rows['not_sampled']} by sampling",
        "capped       at the document by which there were 1,000 tokens",
    ]


def test_a_bad_line_after_the_cap_is_not_met(tokenizer_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "word1"}\n{"text": "word2"}\n{\n')
    flags = ("--input", tmp_path / "a.jsonl", "--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "o")
    assert preprocess(*flags, "--max-tokens", sum(map(len, ids_of(tokenizer_folder, ["word1", "word2"])))) == 0
    assert manifest_of(tmp_path / "o")["bad_lines"] == 0
    assert preprocess(*flags) == 2


def stop_after_chunks(num_chunks: int) -> Callable[[str], None]:
    """A `report` that interrupts."""
    chunks = []

    def report(line: str) -> None:
        chunks.extend([line] * (" ETA " in line and not line.startswith("done")))
        if len(chunks) >= num_chunks:
            raise KeyboardInterrupt

    return report


def test_selected_and_stopped_at_every_chunk_it_comes_out_the_same(corpus, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(restart, "SECONDS_BETWEEN", 0.0)
    every = ids_of(tokenizer_folder, WANTED)

    def options(folder: Path) -> IndexingOptions:
        return IndexingOptions(
            input=[str(corpus)],
            output_prefix=str(folder / "o"),
            tokenizer_model=tokenizer_folder,
            filters=tuple(map(parse_filter, FILTERS[1::2])),
            sample_fraction=0.7,
            max_tokens=sum(map(len, every)) // 2,
            log_interval=1,
        )

    indexing.index_documents(options(tmp_path / "whole"), report=lambda line: None)
    stops = 0
    while not (tmp_path / "again" / "o_text_document.idx").exists():
        stops += 1
        try:
            indexing.index_documents(options(tmp_path / "again"), report=stop_after_chunks(2))
        except KeyboardInterrupt:
            assert stops < 100
    assert stops > 3
    for suffix in (".bin", ".idx", ".json"):
        name = f"o_text_document{suffix}"
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("change", [{"filters": (parse_filter("int_score >= 3"),)}, {"max_tokens": 10**6}])
def test_another_selection_does_not_go_on_with_this_one(tokenizer_folder, tmp_path, monkeypatch, change):
    monkeypatch.setattr(restart, "SECONDS_BETWEEN", 0.0)
    write_jsonl(tmp_path / "rows.jsonl")
    values = {"input": [str(tmp_path / "rows.jsonl")], "output_prefix": str(tmp_path / "o"), "log_interval": 1}
    options = IndexingOptions(**values, tokenizer_model=tokenizer_folder, sample_fraction=0.5)
    with pytest.raises(KeyboardInterrupt):
        indexing.index_documents(options, report=stop_after_chunks(2))
    lines: list[str] = []
    indexing.index_documents(IndexingOptions(**{**vars(options), **change}), report=lines.append)
    assert not lines[0].startswith("goes on")


def test_openhermes_like_rows_become_the_chats_that_the_template_renders(tokenizer_folder, tmp_path):
    """Lists of structs of a table, with a column of weights that are null, and rows of JSON lines."""
    import shutil

    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    chats = [[("system", "word1"), ("human", "word2"), ("gpt", "word3")], [("human", "word4"), ("gpt", "word5")]]
    rows = [
        {"source": source, "conversations": [{"from": who, "value": text, "weight": None} for who, text in chat]}
        for source, chat in zip(("airoboros2.2", "other"), chats, strict=True)
    ]
    turn = pyarrow.struct([("from", pyarrow.string()), ("value", pyarrow.string()), ("weight", pyarrow.float64())])
    schema = pyarrow.schema([("source", pyarrow.string()), ("conversations", pyarrow.list_(turn))])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "table.parquet")
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [
        "<s>system: word1</s><s>user: word2</s><s>assistant: word3</s>",
        "<s>user: word4</s><s>assistant: word5</s>",
    ]
    for name in ("table.parquet", "lines.jsonl"):
        flags = ("--input", tmp_path / name, "--tokenizer-model", folder, "--json-keys", "conversations")
        assert preprocess(*flags, "--output-prefix", tmp_path / "all") == 0
        assert read_documents(tmp_path / "all_conversations_document") == ids_of(tokenizer_folder, texts)
        assert preprocess(*flags, "--filter", "source != other", "--output-prefix", tmp_path / "one") == 0
        assert read_documents(tmp_path / "one_conversations_document") == ids_of(tokenizer_folder, texts[:1])
