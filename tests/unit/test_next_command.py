"""The line with which commands end: pasted into a shell, it is the next command, with this one's paths."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from hf_teachers import write_llama
from megatron_lrc.checkpoints.run_directory import RunState
from megatron_lrc.commands import next_command
from megatron_lrc.commands.main import MODULES, main, run_command
from megatron_lrc.config import Config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where we are: a teacher, under a name that needs quotes, and text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["megatron-lrc"])
    write_llama(tmp_path / "my teacher")
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "a small language model " * 20}) + "\n")
    return tmp_path


def next_line(output: str) -> list[list[str]]:
    """The words of each command of the last line of what a command has printed."""
    name, _, line = output.splitlines()[-1].partition(": ")
    assert name == "next" and output.count("next: ") == 1
    words = [[]]
    for word in shlex.split(line):
        words = [*words, []] if word == "&&" else [*words[:-1], [*words[-1], word]]
    return words


def test_indexed_text_is_trained_on_by_a_line_that_training_accepts(folder, capsys):
    flags = ["--input", "corpus.jsonl", "--output-prefix", "data/corpus", "--tokenizer-model", "my teacher"]
    assert main(["preprocess", *flags, "--append-eod"]) == 0
    ((program, command, *train),) = next_line(capsys.readouterr().out)
    assert (Path(program).name, command) == ("megatron-lrc", "train")
    expected = "--teacher 'my teacher' --student-hidden-size 24 --seq-length 256 --data-path data/corpus_text_document"
    assert train == shlex.split(expected + " --train-epochs 1 --save runs/corpus_text")
    # One document cannot be divided, but that is all that training has against it.
    assert main(["check", *train, "--split", "1,0,0", "--eval-iters", "0", "--seq-length", "16"]) == 0
    assert capsys.readouterr().out == ""


def test_what_is_not_known_stands_in_capitals(folder):
    (command,) = next_command.after_indexing(["data/nowhere"])
    assert command[1][:4] == ["--teacher", "TEACHER", "--student-hidden-size", "N"]
    ((_, flags),) = next_command.after_indexing(["data/a_text_document", "data/a_code_document"])
    assert flags[4:7] == ["--data-path", "data/a_text_document", "data/a_code_document"]  # epochs go with no weights


def test_a_conversion_is_followed_by_indexing_with_its_tokenizer(folder, capsys):
    assert main(["convert-from-hf", "--hf-model", "my teacher", "--output", "con verted", "--no-verify"]) == 0
    ((_, command, *flags),) = next_line(capsys.readouterr().out)
    assert command == "preprocess" and flags[flags.index("--tokenizer-model") + 1] == "con verted"


def test_a_finished_run_is_exported_and_reported(folder):
    config = Config()
    config.checkpoint.save = "runs/my run/"
    state = RunState(teacher_fingerprint="", step=3)
    assert next_command.after_training(config, state) == [
        ("convert-to-hf", ["--load", "runs/my run/", "--output", "runs/my run-hf"]),
        ("report", ["runs/my run/"]),
    ]
    (folder / "runs/my run-hf").mkdir(parents=True)
    assert next_command.after_training(config, state)[0][1][-1] == "--force"
    config.model.method, config.pruning.prune_after = "sheared", 5  # masked, not cut yet: there is no student
    assert [name for name, _ in next_command.after_training(config, state)] == ["report"]
    config.checkpoint.save = None
    assert next_command.after_training(config, state) == []


@pytest.mark.parametrize(
    ("data", "flags"),
    [
        ({"data_path": ["1", "a b", "2", "/data/c"]}, ["a b", "/data/c", "--split", "969,30,1"]),
        ({"train_data_path": ["t"], "valid_data_path": ["v"]}, ["v", "--eval-split", "all"]),
        ({"data_path": ["a"], "split": "1,0,0"}, ["a", "--eval-split", "all"]),
    ],
)
def test_an_export_is_evaluated_on_the_runs_held_out_text(folder, data, flags):
    config = Config()
    for name, value in data.items():
        setattr(config.data, name, value)
    tail = ["--seq-length", 2048, "--teacher", "my teacher"]
    expected = [("evaluate", [Path("out"), "--data-path", *flags, *tail])]
    assert next_command.after_export(config, folder / "my teacher", Path("out")) == expected
    converted = folder / "release"  # no Hugging Face weights: nothing that evaluate could compare with
    assert next_command.after_export(config, converted, Path("out"))[0][1][-1] == 2048


def test_only_an_evaluated_run_has_a_report(tmp_path):
    assert next_command.after_evaluation(tmp_path) == []
    (tmp_path / "metrics.jsonl").touch()
    assert next_command.after_evaluation(tmp_path) == [("report", [tmp_path])]


@pytest.mark.parametrize(
    ("program", "is_on_path", "expected"),
    [
        ("python -m megatron_lrc train", True, "python -m megatron_lrc report 'my run'"),
        ("python -m megatron_lrc train", False, "PYTHON -m megatron_lrc report 'my run'"),
        ("some_tool.py", True, "python '/a checkout/tools/report.py' 'my run'"),
        ("some_tool.py", False, "PYTHON '/a checkout/tools/report.py' 'my run'"),
        ("megatron-lrc train", False, "'/a checkout/tools/some_tool.py' report 'my run'"),  # what was called
    ],
)
def test_the_next_command_is_called_as_this_one_was(program, is_on_path, expected, tmp_path, monkeypatch, capsys):
    for name in ("python", "python3"):
        (tmp_path / name).touch(mode=0o700)
    monkeypatch.setattr(sys, "argv", ["/a checkout/tools/some_tool.py"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3.12"))
    monkeypatch.setenv("PATH", str(tmp_path) if is_on_path else "/nowhere")
    next_command.say_next(program, [("report", ["my run"])])
    assert capsys.readouterr().out == f"next: {expected.replace('PYTHON', sys.executable)}\n"


@pytest.mark.parametrize("is_on_path", [True, False])
def test_a_checkouts_training_is_its_script_with_this_interpreter(is_on_path, tmp_path, monkeypatch, capsys):
    (tmp_path / "python3").touch(mode=0o700)
    monkeypatch.setattr(sys, "argv", ["tools/preprocess_data.py"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3.12"))
    monkeypatch.setenv("PATH", str(tmp_path) if is_on_path else "/nowhere")
    next_command.say_next("preprocess_data.py", [("train", ["--lr", 1])])
    python = "" if is_on_path else f"env PYTHON={sys.executable} "
    assert capsys.readouterr().out == f"next: {python}bash examples/pretrain_lrc.sh --lr 1\n"


def test_where_nothing_follows_nothing_is_said(capsys):
    next_command.say_next("some_tool.py", [])
    assert capsys.readouterr().out == ""


def test_every_command_that_may_follow_exists():
    assert set(next_command.FILES) <= set(MODULES)
    assert all((ROOT / file).is_file() for file in next_command.FILES.values())


def test_a_command_that_fails_names_no_next_one(folder, capsys):
    assert run_command("convert-to-hf", ["--load", "nowhere", "--output", "out"], program="convert_to_hf.py") == 2
    assert capsys.readouterr().out == ""
