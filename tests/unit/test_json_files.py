"""JSON of others is read through one door, and whatever is wrong with it ends in a sentence or is passed over."""

import ast
import json
import os
import shutil
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_lrc.checkpoints.run_directory import RunState, find_missing, read_state
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.data.indexed_files import read_indexed_file
from megatron_lrc.data.restart import Done, Journal, Position
from megatron_lrc.evaluation.questions import read_questions
from megatron_lrc.json_files import LARGEST_BYTES, parse_json, read_json, read_object
from megatron_lrc.report.run_files import read_run
from megatron_lrc.report.run_page import render
from megatron_lrc.train.jsonl import read_records
from megatron_lrc.train.starts import lost_work
from megatron_lrc.train.stopping import STOP_FILE, Stopping
from tiny_data import write_dataset

PACKAGE = Path(__file__).parents[2] / "megatron_lrc"
SAVED = Path(__file__).parents[1] / "fixtures/old_checkpoints/lrc/iter_0000003"
DEEP = "[" * 100_000, "[" * 500 + "]" * 500, '{"a":' * 900 + "1" + "}" * 900

#: What reads JSON by itself. Of ourselves: our other ranks, libraries in this process, text that a command here wrote,
#: an installed package.
#: records.py: the lines of training data, of which there are billions.
OTHERS = {
    *("data/records.py", "data/byte_pair.py", "data/directory_tokenizer.py", "hf/exported_tokenizer.py"),
    *("hf/shared_hash.py", "mcore/distributed.py"),
    *("comparison/material.py", "evaluation/task_package.py"),
}


def test_json_is_read_through_one_door() -> None:
    for path in PACKAGE.rglob("*.py"):
        name, text = path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")
        if "json" not in text or name == "json_files.py":
            continue
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
        is_reading = any(ast.unparse(node) in ("json.load", "json.loads") for node in calls)
        assert not is_reading or name in OTHERS or name.startswith("launch/"), name


@pytest.mark.parametrize("text", [*DEEP, "1" * 5000, "[" + "9" * 301 + "]", "{", "", b"\xff", b"\xff\xfe{\x00"])
def test_what_is_no_json_worth_following_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_ordinary_json_is_taken() -> None:
    values = {"model_max_length": int(1e30), "nested": json.loads("[" * 90 + "]" * 90), "none": None, "share": 0.5}
    assert parse_json(json.dumps(values)) == values
    assert parse_json("null") is None


def test_only_regular_files_of_a_likely_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # to open it would wait
    (tmp_path / "list").write_text("[]")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(LARGEST_BYTES + 1)
    for name, words in (("folder", "is a folder"), ("pipe", "no regular file"), ("large", "MB, and no such file")):
        with pytest.raises(ValueError, match=words):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match="holds no JSON object"):
        read_object(tmp_path / "list")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")


@pytest.mark.parametrize("text", [*DEEP, "[]", "null", '{"files": 3}', '{"files": {"..": {"size": 1, "crc32": 1}}}'])
def test_a_run_json_of_any_kind_is_damage(tmp_path: Path, text: str) -> None:
    path = Path(shutil.copytree(SAVED, tmp_path / SAVED.name))
    assert find_missing(path) is None
    (path / "run.json").write_text(text)
    assert find_missing(path)
    with pytest.raises(ConfigError, match="written by another version, or damaged"):
        read_state(path)


@pytest.mark.parametrize("text", [*DEEP, '{"documents": 1, "tokens": 2, "tokenizer": {"fingerprint": 1}}'])
def test_a_manifest_and_questions_of_any_kind_are_a_sentence(tmp_path: Path, text: str) -> None:
    prefix = write_dataset(tmp_path / "data", [[1, 2]])
    Path(f"{prefix}.json").write_text(text)
    with pytest.raises(ConfigError, match="is not a manifest of tools/preprocess_data.py"):
        read_indexed_file(prefix)
    (tmp_path / "questions.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="questions.jsonl:1 is no item"):
        read_questions(tmp_path / "questions.jsonl")


def test_a_damaged_journal_is_not_gone_on_from(tmp_path: Path) -> None:
    """Its numbers say how much of the partial files belongs to the output, so another number is other data."""
    journal = Journal(str(tmp_path / "journal"), {})
    done = Done(position=Position(lines=5), counts={"text": {"tokens": 90}}, rows={"kept": 5})
    journal.write(done, lambda: None)
    assert journal.read() == done
    text = Path(journal.path).read_text()
    for damaged in (text.replace("90", "91"), text.replace('"lines": 5', '"lines": "5"'), *DEEP, "[]"):
        Path(journal.path).write_text(damaged)
        assert journal.read() is None


GOOD = {"step": 2, "tokens": 64, "lm_loss": 2.0, "step_seconds": 0.5, "clone_by_layer": {"q": [0.1, 0.2]}}
ODD = {
    "tokens": ["64", None, [], {}, 1e300, -5, True, "x" * 100],
    "lm_loss": ["2.0", None, [1], {"a": 1}, 1e300, -1e300, 10**200],
    "clone_by_layer": [3, [1], {"q": 5}, {"q": ["x", None, {}]}, {"other": [10**200]}],
    "time": [5, "yesterday", "2026-01-01T00:00:00", None, []],
    "grad_norm_by_group": [["a"], {"a": "b"}, 3],
    "effective_rank": [{"student": "x"}, {"student": [None, "x"]}, []],
    "layout": [[], "x", {"tp": []}],
    "lost_steps": ["3", [], -1, 1e300],
    "train_iters": ["x", 0, -5, 1e300],
    "step_seconds": ["x", None, 1e300, {}],
    "heldout": [[], {"text": 5}],
    "checkpoint": [7, []],
}


@pytest.mark.parametrize("name", ODD)
def test_a_report_keeps_what_it_can_of_odd_records(tmp_path: Path, name: str) -> None:
    for value in ODD[name]:
        records = [GOOD, {**GOOD, "step": 3, "tokens": 96, name: value}, {**GOOD, "step": 4, "tokens": 128}]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        for file in ("metrics.jsonl", "validation.jsonl", "evaluations.jsonl", "starts.jsonl"):
            (tmp_path / file).write_text(lines)
        page = render(read_run(tmp_path), datetime.now(timezone.utc))
        assert "LM loss" in page
        assert lost_work(read_records(tmp_path / "metrics.jsonl"), 0)[0] == 4


def test_a_folder_by_the_name_of_the_stop_file_is_no_request(tmp_path: Path) -> None:
    config, groups = Config(), SimpleNamespace(is_main_rank=True)
    config.checkpoint.save = str(tmp_path)
    stopping = Stopping(config, RunState(), groups)  # type: ignore[arg-type]  (no more of the groups is asked)
    (tmp_path / STOP_FILE).mkdir()
    assert not any(stopping.requests())
    (tmp_path / STOP_FILE).rmdir()
    (tmp_path / STOP_FILE).touch()
    assert stopping.requests()[-1]
