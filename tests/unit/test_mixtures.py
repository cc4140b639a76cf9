"""--sources FILE: a dataset of each source, checked together beforehand, and the flag that mixes them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny_data
from command_line import ROOT
from megatron_lrc.config import parse_config
from megatron_lrc.data import encoding, mixtures, restart
from megatron_lrc.data.blends import plan_data
from megatron_lrc.data.mixtures import index_sources, read_sources
from megatron_lrc.data.preparation import IndexingOptions
from megatron_lrc.data.tokenizers import load_tokenizer
from preprocess_tool import check_refused, file_names, preprocess
from tiny_data import read_documents

TEXTS = tiny_data.make_texts(400)
SUFFIXES = (".bin", ".idx", ".json")


@pytest.fixture
def mixture(tmp_path) -> Path:
    """Scored rows in a table, lines of two keys, and the file that names them."""
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "corpus" / "edu").mkdir(parents=True)
    rows = {"text": TEXTS, "int_score": [number % 6 for number in range(len(TEXTS))]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "corpus" / "edu" / "1.parquet")
    lines = [json.dumps({"body": text, "text": "other"}) + "\n" for text in TEXTS[:100]]
    (tmp_path / "corpus" / "notes.jsonl").write_text("".join(lines))
    sources = [
        {"name": "edu", "input": "edu/*.parquet", "filter": "int_score >= 4", "max_tokens": "1K"},
        {"name": "notes", "input": ["notes.jsonl"], "json_keys": "body", "sample_fraction": 0.5, "max_tokens": "1M"},
    ]
    return write_sources(tmp_path / "corpus" / "mixture.yaml", sources)


def write_sources(path: Path, sources: Any) -> Path:
    path.write_text(yaml.safe_dump(sources))
    return path


def test_each_source_is_a_dataset_whose_manifest_says_how_it_was_chosen(mixture, tokenizer_folder, tmp_path, capsys):
    flags = ("--sources", mixture, "--tokenizer-model", tokenizer_folder, "--append-eod")
    assert preprocess(*flags, "--output-prefix", tmp_path / "out" / "mix") == 0
    names = ("mix_edu_text_document", "mix_notes_body_document")
    assert file_names(tmp_path / "out") == {f"{name}{suffix}" for name in names for suffix in SUFFIXES}
    edu, notes = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in names)

    wanted = [text for number, text in enumerate(TEXTS) if number % 6 >= 4]
    every = [[*ids, 1] for ids in load_tokenizer(tokenizer_folder).encode_batch(wanted)]
    documents = read_documents(tmp_path / "out" / names[0])
    assert documents == every[: len(documents)] and sum(map(len, documents[:-1])) < 1000 <= edu["tokens"]
    assert {name: edu["options"][name] for name in ("source", "filters", "sample_fraction", "max_tokens")} == {
        "source": "edu",
        "filters": ["int_score >= 4"],
        "sample_fraction": 1.0,
        "max_tokens": 1000,
    }
    assert edu["rows"]["kept"] == len(documents) and edu["rows"]["filtered"] > 0
    assert (notes["options"]["source"], notes["options"]["sample_fraction"]) == ("notes", 0.5)
    assert notes["rows"]["not_sampled"] > 10 and notes["rows"]["kept"] > 10

    printed = capsys.readouterr().out
    assert f"'notes' has {notes['tokens']:,} tokens, fewer than its budget of 1,000,000" in printed
    assert "'edu' has" not in printed
    flag, *values = printed.split("train on them with: ")[1].splitlines()[0].split()
    assert f"--data-path {' '.join(str(tmp_path / 'out' / name) for name in names)}" in printed.split("next: ")[1]
    blend = plan_data(parse_config([flag, *values])).train
    assert blend is not None and blend.weights is not None
    assert blend.prefixes == [str(tmp_path / "out" / name) for name in names]
    total = edu["tokens"] + notes["tokens"]
    assert blend.weights == pytest.approx([edu["tokens"] / total, notes["tokens"] / total], rel=1e-5)


BAD_SOURCES = {
    "unknown key": ({"name": "a", "input": "notes.jsonl", "filters": "x > 1"}, "did you mean filter?"),
    "no source": ("a", "source 3: 'a' is no source"),
    "no name": ({"input": "notes.jsonl"}, "source 3: the name is None"),
    "bad name": ({"name": "a/b", "input": "notes.jsonl"}, "source a/b: the name is 'a/b'"),
    "same name": ({"name": "edu", "input": "notes.jsonl"}, "the sources 'edu' and 'edu' would both write"),
    "no input": ({"name": "a"}, "source a: it has no input"),
    "no text": ({"name": "a", "input": 7}, "source a: input is 7"),
    "missing file": ({"name": "a", "input": "none.jsonl"}, "none.jsonl: there is no such file"),
    "filter": ({"name": "a", "input": "notes.jsonl", "filter": "x"}, "source a: --filter 'x' is no condition"),
    "fraction": ({"name": "a", "input": "notes.jsonl", "sample_fraction": 2}, "--sample-fraction 2.0 is no share"),
    "fraction text": ({"name": "a", "input": "notes.jsonl", "sample_fraction": "1/2"}, "sample_fraction is '1/2'"),
    "budget": ({"name": "a", "input": "notes.jsonl", "max_tokens": "lots"}, "max_tokens lots is no number"),
    "column": ({"name": "a", "input": "edu", "json_keys": "body"}, "1.parquet has no column 'body'"),
    "filter column": ({"name": "a", "input": "edu", "filter": "x > 1"}, "1.parquet has no column 'x'"),
    "key of lines": ({"name": "a", "input": "notes.jsonl", "json_keys": "title"}, "its first row: no key 'title'"),
    "filter of lines": ({"name": "a", "input": "notes.jsonl", "filter": "x > 1"}, "its first row: no key 'x', which"),
}


@pytest.mark.parametrize("source, reason", BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_a_source_that_cannot_be_is_refused_before_any_is_read(
    mixture, tokenizer_folder, tmp_path, capsys, source, reason
):
    write_sources(mixture, [*yaml.safe_load(mixture.read_text()), source])
    flags = ("--sources", mixture, "--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "out" / "mix")
    assert preprocess(*flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(mixture) in error and reason in error
    assert not (tmp_path / "out").exists() or file_names(tmp_path / "out") == set()


@pytest.mark.parametrize("content", [{"name": "a", "input": "notes.jsonl"}, [], "a", None])
def test_what_is_no_list_of_sources_is_refused(mixture, tokenizer_folder, tmp_path, capsys, content):
    flags = ("--sources", write_sources(mixture, content), "--tokenizer-model", tokenizer_folder)
    check_refused(capsys, f"{mixture} is no list of sources", *flags, "--output-prefix", tmp_path / "mix")


def test_flags_that_differ_by_source_belong_into_the_file(mixture, tokenizer_folder, tmp_path, capsys):
    flags = ("--sources", mixture, "--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "mix")
    check_refused(capsys, "write them into --sources", *flags, "--filter", "int_score >= 4")
    check_refused(capsys, "write them into --sources", *flags, "--max-tokens", "1K")
    mixture.write_text("- name: [")
    check_refused(capsys, "is not valid YAML", *flags)
    mixture.unlink()
    check_refused(capsys, "cannot be read", *flags)


def test_no_dataset_takes_the_place_of_a_file_of_another_source(tokenizer_folder, tmp_path, capsys):
    """The second source's manifest would be the first one's input."""
    tiny_data.write_jsonl(tmp_path / "mix_b_text_document.json", ["word1"])
    tiny_data.write_jsonl(tmp_path / "b.jsonl", ["word2"])
    sources = [{"name": "a", "input": "mix_b_text_document.json"}, {"name": "b", "input": "b.jsonl"}]
    path = write_sources(tmp_path / "mixture.yaml", sources)
    flags = ("--sources", path, "--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "mix")
    check_refused(capsys, "is one of the inputs", *flags)


def test_stopped_it_goes_on_and_reads_no_finished_source_again(mixture, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(restart, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 2000)

    def options(folder: str) -> IndexingOptions:
        prefix = str(tmp_path / folder / "mix")
        return IndexingOptions(input=[], output_prefix=prefix, tokenizer_model=tokenizer_folder, log_interval=1)

    def stop_in_notes(line: str) -> None:
        if line.startswith("notes: ") and " ETA " in line:
            raise KeyboardInterrupt

    index_sources(str(mixture), options("whole"), report=lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        index_sources(str(mixture), options("again"), report=stop_in_notes)
    assert "mix_edu_text_document.idx" in file_names(tmp_path / "again")
    lines: list[str] = []
    index_sources(str(mixture), options("again"), report=lines.append)
    assert lines[0].startswith("edu: wrote ") and lines[1].startswith("notes: goes on after ")
    assert file_names(tmp_path / "again") == file_names(tmp_path / "whole")
    for name in file_names(tmp_path / "whole"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_source_whose_dataset_is_gone_is_made_again(mixture, tokenizer_folder, tmp_path):
    options = IndexingOptions(input=[], output_prefix=str(tmp_path / "mix"), tokenizer_model=tokenizer_folder)
    preparation = mixtures.prepare_sources(str(mixture), options, lambda line: None)[0]
    journal = preparation.journal()
    mixtures.write_datasets(preparation, journal, report=lambda line: None)
    before = (tmp_path / "mix_edu_text_document.bin").read_bytes()
    assert journal.exists()
    for suffix in SUFFIXES:
        (tmp_path / f"mix_edu_text_document{suffix}").unlink()
    mixtures.write_datasets(preparation, journal, report=lambda line: None)
    assert (tmp_path / "mix_edu_text_document.bin").read_bytes() == before


#: The tokens, in millions, of the published mixtures (arXiv 2505.12781).
PUBLISHED = {
    "lrc-1.5b": {"fineweb-edu": 10_000, "openhermes": 450},
    "lrc-1.7b": {"fineweb-edu": 20_000, "openhermes": 450},
    "lrc-2.7b": {"redpajama": 10_000},
    "lrc-4b": {"fineweb-edu": 18_000, "dclm": 2000, "cosmopedia": 1000, "openhermes": 450},
}
#: A row of each data set, with the columns that matter.
ROWS = {
    "fineweb-edu": {"text": "word1 word2", "id": "a", "language_score": 0.9, "score": 4.2, "int_score": 4},
    "openhermes": {
        "conversations": [{"from": "human", "value": "word1", "weight": None}, {"from": "gpt", "value": "word2"}],
        "source": "airoboros",
    },
    "dclm": {"text": "word1 word2 word3", "url": "x"},
    "cosmopedia": {"text": "word4 word5", "prompt": "x", "seed_data": "y"},
    "redpajama": {"text": "word6", "meta": {"source": "arxiv"}},
}


def test_there_is_a_file_for_every_published_mixture():
    found = {path.stem: path for path in (ROOT / "examples" / "data").glob("*.yaml")}
    common = IndexingOptions(input=[], output_prefix="mix", tokenizer_model="TEACHER")
    assert {
        name: {source.source: (source.max_tokens or 0) // 10**6 for source in read_sources(str(path), common)}
        for name, path in found.items()
    } == PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_mixtures_are_made_of_rows_like_theirs(name, chat_folder, tmp_path, capsys):
    """With placeholders where the data belongs."""
    path = tmp_path / f"{name}.yaml"
    path.write_text((ROOT / "examples" / "data" / path.name).read_text())
    sources = yaml.safe_load(path.read_text())
    for source in sources:
        write_placeholder(tmp_path, source)
    flags = ("--sources", path, "--tokenizer-model", chat_folder, "--eos-before-bos-after")
    assert preprocess(*flags, "--output-prefix", tmp_path / "out" / "mix") == 0
    printed = capsys.readouterr().out
    assert printed.count("fewer than its budget") == len(sources)
    keys = {source["name"]: source.get("json_keys", "text") for source in sources}
    assert {file.removesuffix(".idx") for file in file_names(tmp_path / "out") if file.endswith(".idx")} == {
        f"mix_{source}_{key}_document" for source, key in keys.items()
    }


@pytest.fixture
def chat_folder(tmp_path, tokenizer_folder) -> Path:
    import shutil

    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}assistant: {% endif %}"
    (folder / "chat_template.jinja").write_text(template + prompt)
    return folder


def write_placeholder(folder: Path, source: dict[str, Any]) -> None:
    """A file that the source's pattern matches, with enough rows that some are sampled."""
    import pyarrow
    import pyarrow.parquet

    row = ROWS[source["name"]]
    rows = [{**row, "text": f"word{number}"} if "text" in row else row for number in range(600)]
    pattern = source["input"].replace("**", "part").replace("*.jsonl*", "1.jsonl").replace("*", "1")
    path = folder / pattern
    path.parent.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".zst":
        tiny_data.write_zst(path, [lines])
    else:
        path.write_bytes(lines)
