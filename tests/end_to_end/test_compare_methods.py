"""tools/compare_methods.py from the command line to its files, on tiny models: a few steps each."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hf_teachers import write_llama
from megatron_lrc.comparison import run_plan as plan
from megatron_lrc.comparison.contestant import Contestant
from megatron_lrc.comparison.contestants import contestants
from megatron_lrc.comparison.material import Material, last_step
from megatron_lrc.comparison.runner import Runner, is_complete, saved_steps
from megatron_lrc.comparison.scoring import Scoring
from megatron_lrc.comparison.workload import Workload
from tiny_data import make_texts, write_counting, write_jsonl
from tools_path import TOOLS

CONTESTANTS = contestants()
TINY = "--tokens 64 --seq-length 16 --global-batch-size 2 --student-hidden-size 20 --validations 2 --eval-iters 1"


def compare(output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "compare_methods.py"), "--output", str(output), *TINY.split(), *flags]
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """--teacher and --data-path."""
    folder = tmp_path_factory.mktemp("given")
    write_llama(folder / "teacher")
    data = write_counting(folder / "counting")
    return ["--teacher", str(folder / "teacher"), "--data-path", data, "--split", "80,20,0"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_contestants_and_two_seeds_then_resumed_with_a_third_that_fails(given, tmp_path):
    flags = [*given, "--contestants", "lrc-random", "ordinary", "--seeds", "1", "2", "--ordinary-times", "1"]
    done = compare(tmp_path, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[4/4]" in done.stdout and "left" in done.stdout and "| lrc-random |" in done.stdout
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("table.md", "curves.svg", "report.html"))
    found = json.loads((tmp_path / "results.json").read_text())
    assert [one["name"] for one in found["contestants"]] == ["lrc-random", "ordinary"]
    for one in found["contestants"]:
        assert [run["seed"] for run in one["runs"]] == [1, 2] and one["loss"]["lowest"] < one["loss"]["highest"]
        for run in one["runs"]:
            assert [tokens for tokens, _ in run["points"]] == [0, 32, 64] and run["points"][-1][1] == run["loss"]
            assert run["tokens_per_second"] > 0 and run["versions"]["torch"]
    assert len(found["contestants"][0]["ordinary_needs_times"]) == 2

    runs = tmp_path / "runs"
    validations = runs / "ordinary-x1-seed2/validation.jsonl"
    validations.write_text("".join(validations.read_text().splitlines(keepends=True)[:-1]))  # as if it had been killed
    stamps = {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.jsonl")}
    # A clone term of a layer that the teacher does not have is found by the run itself.
    broken = ["--add", "broken=--init random --clone-terms q:9"]
    listed = compare(tmp_path, *flags, *broken, "--list")
    states = dict(re.findall(r"^\| (\S+) \| (.*?) \|", listed.stdout, re.M))
    assert states["lrc-random-x1-seed1"] == "done" and states["broken-x1-seed2"] == "not begun"
    assert "3 of 6 runs are done; about 0.0 hours" in listed.stdout
    again = compare(tmp_path, *flags, *broken)
    assert again.returncode == 1
    assert "3 of 6 runs are already in" in again.stdout and "[3/3]" in again.stdout
    assert "FAILED broken-x1-seed1: error: " in again.stderr and "layer" in again.stderr
    after = json.loads((tmp_path / "results.json").read_text())
    assert [one["run"] for one in after["failed"]] == ["broken-x1-seed1", "broken-x1-seed2"]
    assert [one["loss"] for one in after["contestants"]] == [one["loss"] for one in found["contestants"]]
    again = {path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert again == {runs / "ordinary-x1-seed2/metrics.jsonl"}
    assert [path.name for path in (tmp_path / "set-aside").iterdir()] == ["ordinary-x1-seed2-1"]

    flags = tuple(after["contestants"][0]["runs"][0]["flags"])
    run = plan.Run(CONTESTANTS["lrc-random"], 1.0, 1, None, 64, 2, flags)
    assert is_complete(run, runs / run.name)
    spectrum = after["contestants"][0]["runs"][0]["scores"]["projections"]
    assert 1 < spectrum["effective_rank"] <= 20 and spectrum["worst_condition"] >= spectrum["condition"] > 1
    assert not after["contestants"][1]["runs"][0]["scores"]["projections"]  # ordinary training has none
    other = replace(run, flags=(*flags, "--clip-grad", "0.5"))  # other settings under the same name: another run
    assert not is_complete(other, runs / run.name)


@pytest.mark.slow
@pytest.mark.distributed
def test_without_a_teacher_one_is_made_from_the_users_text(tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", make_texts(400))
    flags = f"--text {text} --vocab-size 300 --teacher-tokens 128 --teacher-hidden-size 32 --teacher-num-layers 2"
    flags += " --teacher-ffn-hidden-size 48 --teacher-head-dim 16 --contestants lrc-pca --lr-grid 1e-3 1e-2 --no-png"
    done = compare(tmp_path / "out", *flags.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learning rate of lrc-pca" in done.stdout and not (tmp_path / "out/curves.svg").exists()
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert [run["grid_lr"] for run in found["grid"]] == [1e-3, 1e-2] and found["teacher_loss"] > 0
    (teacher,) = (tmp_path / "out").glob("material-*/teacher/config.json")
    stamp = teacher.stat().st_mtime_ns
    again = compare(tmp_path / "out", *flags.split())
    assert again.returncode == 0 and "material:" not in again.stdout and teacher.stat().st_mtime_ns == stamp
    assert "2 of 2 runs are already in" in again.stdout and "1 of 1 runs are already in" in again.stdout
    (run,) = found["contestants"][0]["runs"]
    scored = run["scores"]["text"]["held-out"]
    assert scored["teacher_lm_loss"] > 0 and scored["kl"] > 0 and scored["tokens"] > 100
    assert "| held-out: LM loss |" in (tmp_path / "out/table.md").read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_is_stopped_saves_and_goes_on_from_there(given, tmp_path):
    shape = {"student_hidden_size": 20, "tokens": 32 * 10**6, "seq_length": 16, "global_batch_size": 2}
    sizes = plan.Sizes(**shape, ordinary_times=1, grid_times=1, validations=1, eval_iters=1)
    material = Material(Path(given[1]), tuple(given[2:]), "")
    one = Contestant("often", "--init random --log-interval 5", "")
    runs = [plan.make_run(one, 1, seed, None, sizes=sizes, material=material) for seed in (1, 2)]

    def steps_after_stop(before: int) -> int:
        """Of the first run, stopped when it has gone on from there; the second has not been begun."""
        what = {"jobs": 1, "threads": 1, "material_time": 0.0, "say": print, "scoring": Scoring(material.teacher)}
        runner = Runner(tmp_path, **what)
        directory = runner.directory(runs[0])

        def stop_when_it_runs() -> None:
            while last_step(directory / "metrics.jsonl") <= before:
                time.sleep(0.1)
            runner._stop()

        watcher = threading.Thread(target=stop_when_it_runs, daemon=True)
        watcher.start()
        outcomes = runner.train(runs)
        watcher.join()
        assert runner.is_stopped and all(outcome.is_stopped for outcome in outcomes.values())
        assert not runner.directory(runs[1]).exists()
        assert Workload.of([], runs, runner, 1).pieces[0].state == f"step {saved_steps(directory)} of {runs[0].steps}"
        return saved_steps(directory)

    first = steps_after_stop(0)
    assert 0 < first < steps_after_stop(first) < runs[0].steps


def test_no_run_is_begun_for_which_the_time_is_too_short(given, tmp_path):
    done = compare(tmp_path, *given, "--max-hours", "0.03", "--contestants", "lrc-random", "--no-png")
    assert done.returncode == 3 and not (tmp_path / "runs/lrc-random-x1-seed1").exists()
    assert "--max-hours 0.03 are over: 0 of 1 runs are done; how long" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--contestants lrc-pac", "unknown; did you mean lrc-pca?"),
        ("--add x=--no-such-flag", "this installation of megatron_lrc does not take its flags"),
        ("--teacher nowhere", "--teacher and --data-path belong together"),
        ("--seeds 1 1", "a seed occurs twice"),
        ("--teacher nowhere --data-path nothing --flags=--lr=-1 --no-png", "contestant lrc-random: "),
    ],
)
def test_a_users_error_is_one_sentence_and_starts_nothing(flags, message, tmp_path):
    done = compare(tmp_path / "out", *flags.split())
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out/runs").exists()
