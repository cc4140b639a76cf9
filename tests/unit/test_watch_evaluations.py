"""evaluate --watch: each checkpoint of a run is scored once, as it appears; the report shows what was found."""

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import tiny_data
from checkpoints import write_run
from hf_teachers import write_llama
from megatron_lrc.checkpoints.run_directory import STATE_FILE, checkpoint_path, checkpoints
from megatron_lrc.commands.evaluate_model import read_flags
from megatron_lrc.config import ConfigError
from megatron_lrc.evaluation.evaluate import EvaluationOptions
from megatron_lrc.evaluation.watching import EVALUATIONS_FILE, LOCK_FILE, read_evaluations, watch
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.locks import FileLock
from students import random_student

LAST_STEP = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, text, and a run of three steps with its last checkpoint."""
    folder = tmp_path_factory.mktemp("watched")
    write_llama(folder / "teacher")
    description = describe_teacher(str(folder / "teacher"))
    write_run(folder / "run", description, *random_student(description, 28, has_lm_head=True), train_iters=LAST_STEP)
    tiny_data.write_jsonl(folder / "heldout.jsonl", ["a small language model", "is cloned from a large one"])
    return folder


def publish(source: Path, run: Path, step: int, *, grad_norm_count: int = 0) -> Path:
    """The source's checkpoint as that of another step, as a training publishes it: by a rename."""
    partial, final = run / f"iter_{step:07d}.partial-x", checkpoint_path(run, step)
    shutil.copytree(checkpoint_path(source / "run", LAST_STEP), partial)
    record = json.loads((partial / STATE_FILE).read_text())
    record["state"] |= {"step": step, "tokens": 1000 * step, "grad_norm_count": grad_norm_count}
    del record["crc32"]
    record["crc32"] = zlib.crc32(json.dumps(record, sort_keys=True).encode())
    (partial / STATE_FILE).write_text(json.dumps(record))
    partial.rename(final)
    return final


def options_of(source: Path, run: Path) -> EvaluationOptions:
    flags = vars(read_flags(["--watch", str(run), "--input", str(source / "heldout.jsonl")], "evaluate.py"))
    del flags["watch_seconds"]
    return EvaluationOptions(**flags | {"model": flags.pop("watch")})


def test_checkpoints_are_scored_as_they_appear_and_once(source: Path, tmp_path: Path) -> None:
    """The run begins after the watch, which goes on where an earlier one ended, and ends with the run."""
    run, said = tmp_path / "run", []
    events: list[Callable[[], object]] = [
        lambda: run.mkdir(),
        lambda: publish(source, run, 1),
        lambda: publish(source, run, 2),
    ]

    def wait(seconds: float) -> None:
        if not events:
            raise KeyboardInterrupt
        events.pop(0)()

    with pytest.raises(KeyboardInterrupt):
        watch(options_of(source, run), said.append, seconds=1, wait=wait)
    assert [record["step"] for record in read_evaluations(run)] == [1, 2]
    assert sum("exporting" in line for line in said) == 2
    publish(source, run, LAST_STEP)
    said.clear()
    watch(options_of(source, run), said.append, seconds=1, wait=wait)
    records = read_evaluations(run)
    assert [(record["step"], record["tokens"]) for record in records] == [(1, 1000), (2, 2000), (3, 3000)]
    assert sum("exporting" in line for line in said) == 1 and "its last checkpoint is scored" in said[-1]
    [figures] = records[-1]["heldout"].values()
    assert 0 < figures["lm_loss"] < 20
    assert [path.name for path in run.iterdir() if not path.name.startswith("iter_")] == [EVALUATIONS_FILE]


def test_a_checkpoint_that_is_removed_meanwhile_is_passed_over(source: Path, tmp_path: Path) -> None:
    """Retention comes between the look at it and its tensors."""
    run, said = tmp_path / "run", []
    first = publish(source, run, 1)
    publish(source, run, LAST_STEP)

    def report(line: str) -> None:
        said.append(line)
        if "exporting step 1" in line:
            first.rename(first.with_name(first.name + ".removed"))
            shutil.rmtree(first.with_name(first.name + ".removed"))

    watch(options_of(source, run), report, seconds=1)
    assert [record["step"] for record in read_evaluations(run)] == [LAST_STEP]
    assert f"{first} is passed over: it was removed meanwhile" in said


def test_a_damaged_checkpoint_is_passed_over_and_a_new_one_of_its_step_is_scored(source: Path, tmp_path: Path) -> None:
    run, said = tmp_path / "run", []
    path = publish(source, run, LAST_STEP)
    tensors = next(path.glob("*.distcp"))
    tensors.write_bytes(b"\0" * tensors.stat().st_size)
    watch(options_of(source, run), said.append, seconds=1)
    assert read_evaluations(run) == [] and any("is passed over" in line for line in said)
    shutil.rmtree(path)
    publish(source, run, LAST_STEP)
    watch(options_of(source, run), said.append, seconds=1)
    shutil.rmtree(path)
    publish(source, run, LAST_STEP, grad_norm_count=7)
    watch(options_of(source, run), said.append, seconds=1)
    assert [record["step"] for record in read_evaluations(run)] == [LAST_STEP], "the newer record replaces the older"
    assert sum("exporting" in line for line in said) >= 2


def test_what_no_checkpoint_could_be_scored_with_is_said_at_once(source: Path, tmp_path: Path) -> None:
    options = options_of(source, tmp_path / "run")
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        watch(replace(options, input=[]), print, seconds=1)
    checkpoint = checkpoints(source / "run")[0]
    with pytest.raises(ConfigError, match="is a checkpoint"):
        watch(replace(options, model=checkpoint), print, seconds=1)


@pytest.mark.parametrize("flags", [[], ["model", "--watch", "run"], ["--watch", "run", "--output", "x.json"]])
def test_one_model_or_one_run_is_expected(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_flags(flags, "evaluate.py")
    assert "evaluate.py: error: " in capsys.readouterr().err


def test_a_second_watching_process_is_refused(source: Path, tmp_path: Path) -> None:
    """Each would replace the other's lines."""
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / LOCK_FILE, place="the first", remedy=""),
        pytest.raises(
            ConfigError, match="evaluations.jsonl is being written by another process .* One watching process"
        ),
    ):
        watch(options_of(source, tmp_path / "run"), lambda line: None, seconds=1)
