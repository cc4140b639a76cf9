"""tools/gpu_check.py: runs to its end without a GPU, and a check that fails or takes too long costs only itself."""

import gc
import json
import os
import re
import sys
import time
import warnings

import pytest

from benchmarks.gpu_check import machine, program, speed, training
from benchmarks.gpu_check.checks import Bound, Check, Skip
from benchmarks.gpu_check.settings import Settings
from benchmarks.gpu_check.short_runs import parse
from benchmarks.gpu_check.stages import Record, Stage, run_stages
from benchmarks.gpu_check.table import lines_of
from command_line import ROOT, run
from megatron_lrc.config import ConfigError
from tools_path import load_tool

gpu_check = load_tool("gpu_check").main


@pytest.fixture(autouse=True)
def only_new_objects():
    """After each stage garbage is collected, which takes a while in a process that has imported everything."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(device="cpu", is_tiny=True, needs_engine=True, teacher=None, seconds=100.0, folder=tmp_path)


# --- the whole program ------------------------------------------------------------------------------------------------


def test_it_runs_to_its_end_without_a_gpu(tiny_llama, tmp_path):
    """Everything that can run there runs; what needs a GPU says so. A pretrained teacher's place is taken by a random
    one with a tokenizer."""
    file = tmp_path / "found.json"
    flags = ("--device", "cpu", "--tiny", "--teacher", tiny_llama(), "--json", str(file))
    out = run(sys.executable, str(ROOT / "tools/gpu_check.py"), *flags)
    content = json.loads(file.read_text())
    stages = {stage["name"]: stage for stage in content["stages"]}
    assert list(stages) == ["machine", "operators", "small model", "speed", "resuming", "training"]
    assert {stage["status"] for stage in stages.values()} == {"ok"}

    checks = [check for stage in content["stages"] for check in stage["checks"]]
    skipped = [check for check in checks if check["status"] == "skipped"]
    assert {check["reason"] for check in skipped} == {"needs CUDA"}
    for check in skipped:
        assert any(word in check["name"] for word in ("Engine", "FP8", "compile", "GEMM")), check["name"]
    figures = {check["name"]: check["figures"] for check in checks if check["status"] == "ok"}
    assert len(figures) + len(skipped) == len(checks)
    bounds = [value for each in figures.values() for value in each.values() if isinstance(value, dict)]
    assert all(0 <= bound["value"] <= bound["limit"] for bound in bounds) and len(bounds) > 30

    # The second step is compared with another gradient than the first one's.
    assert figures["local bf16"]["step 2 from step 1"] > 10 * figures["local bf16"]["step 2: gradients"]["limit"]
    speed = figures["bf16, micro-batches of 3"]
    assert speed["tokens/s"] == pytest.approx(3 * 3 * 16 / speed["seconds"]) and speed["enqueued"] < speed["seconds"]
    assert len(figures["bf16: longest kernels"]["longest"]) == 25
    assert figures["bf16: parts of a step"]["compose"] > 0 < figures["bf16: parts of a step"]["pull back"]
    assert figures["bf16"] | {"loss": 0} == {
        "steps": 3,
        "other figures": {"value": 0, "limit": 0},
        "tensors": 21,
        "other tensors": {"value": 0, "limit": 0},
        "loss": 0,
    }
    assert figures[f"training a clone of {tiny_llama()}"]["steps"] == training.TINY_STEPS
    assert f"{len(figures)} ok, {len(skipped)} skipped; " in out and "local fp32: step 1: losses " in out


def test_megatron_core_is_imported_by_the_stages_that_need_it(settings, tmp_path):
    """A Transformer Engine built for another torch keeps it from being imported: a failure of each of these stages,
    after the first has said what is installed."""
    stages = [stage("first", dict), Stage("broken", 20.0, program.checks_of("nowhere")), stage("next", dict)]
    _, content = done(stages, settings, tmp_path)
    assert [one["status"] for one in content["stages"]] == ["ok", "failed", "ok"]
    assert content["stages"][1]["error"] == "ModuleNotFoundError: No module named 'benchmarks.gpu_check.nowhere'"
    folder = ROOT / "benchmarks/gpu_check"
    for name in ("program", "stages", "settings", "checks", "left_behind", "table", "machine"):
        imported = re.findall(r"^from (megatron\S*)", (folder / f"{name}.py").read_text(), re.MULTILINE)
        assert set(imported) <= {"megatron_lrc.config", "megatron_lrc.whole_files"}, name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cpu"], "Add --tiny."),
        (["--device", "cpu", "--tiny", "--stages", "speed", "spede"], "--stages spede: expected are any of machine,"),
        (["--device", "cpu", "--tiny", "--teacher", "nowhere"], "--teacher nowhere is not a directory."),
    ],
)
def test_errors_are_one_line(flags, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "environ", {})
    assert gpu_check([*flags, "--json", str(tmp_path / "found.json")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "found.json").exists()


def test_a_machine_without_a_gpu_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(program.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "environ", {})
    assert gpu_check([]) == 2
    assert "sees no CUDA GPU here" in capsys.readouterr().err


def test_waits_are_told_apart_by_whether_the_pull_back_has_been_enqueued(monkeypatch):
    """torch warns of each, in a mode that is switched off again."""
    modes = []

    def step(run, batches, *, votes):
        for number in range(3):
            if number == 2:
                votes()
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    monkeypatch.setattr(speed, "train_step", step)
    monkeypatch.setattr(speed.torch.cuda, "set_sync_debug_mode", modes.append)
    found = speed.count_waits(None, iter(()))
    assert (found["waits"], found["waits at the end"], modes) == (2, 1, ["warn", "default"])
    (place,) = found["waits at"]
    assert place.startswith("     3 x tests/unit/test_gpu_check.py:")


def test_the_random_teacher_s_training_is_one_that_can_be_meant(settings):
    """The whole program is run with a teacher that is given."""
    flags = [*training.flags_of_small(settings), "--save", str(settings.folder / "run")]
    assert parse(flags).training.train_iters == training.TINY_STEPS


# --- Transformer Engine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage_check", [machine.engine, machine.need_engine])
def test_a_missing_engine_is_a_failure_that_is_named_unless_it_may_be_missing(settings, stage_check, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    on_gpu = {**vars(settings), "device": "cuda"}
    with pytest.raises(ConfigError, match="transformer-engine is not installed. .*--no-build-isolation.*--without-te"):
        stage_check(Settings(**on_gpu))
    with pytest.raises(Skip, match="--without-te"):
        stage_check(Settings(**on_gpu | {"needs_engine": False}))


def test_an_engine_built_for_another_torch_is_named_with_what_it_says(settings, monkeypatch, tmp_path):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").touch()
    (tmp_path / "transformer_engine/pytorch.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert "cannot be imported (undefined symbol: _ZN3c10)" in (machine.engine_problem() or "")
    sys.modules.pop("transformer_engine")


# --- what runs the stages ---------------------------------------------------------------------------------------------


def done(stages, settings, tmp_path) -> tuple[Record, dict]:
    """The record, and what its file says."""
    record = Record(tmp_path / "found.json", {"about": "this"}, lambda line: None)
    run_stages(stages, settings, record)
    return record, json.loads((tmp_path / "found.json").read_text())


def stage(name, *checks, seconds=20.0) -> Stage:
    def yielded(_):
        yield from (Check(str(number), check) for number, check in enumerate(checks))

    return Stage(name, seconds, yielded)


def fail() -> dict:
    raise RuntimeError("no kernel\nfor this")


def test_a_check_that_fails_is_recorded_and_the_next_ones_go_on(settings, tmp_path):
    over = {"difference": Bound(0.2, 0.1), "not a number": Bound(float("nan"), 0.1), "kept": Bound(0.1, 0.1)}
    record, content = done(
        [stage("first", fail, lambda: over, dict), stage("second", lambda: {"a": 1})], settings, tmp_path
    )
    first, second = content["stages"]
    assert [check["status"] for check in first["checks"]] == ["failed", "failed", "ok"]
    assert first["checks"][0]["error"] == "RuntimeError: no kernel\nfor this"
    assert "def fail" not in first["checks"][0]["traceback"] and "in fail" in first["checks"][0]["traceback"]
    assert first["checks"][1]["error"].endswith("above what is allowed: difference, not a number")
    assert first["checks"][1]["figures"]["difference"] == {"value": 0.2, "limit": 0.1}
    assert (first["status"], second["status"], content["about"]) == ("failed", "ok", "this")
    assert not record.is_good and "  failed: RuntimeError: no kernel: 0" in list(lines_of(content))


def test_a_stage_that_takes_too_long_is_ended_and_clears_away_and_the_next_one_goes_on(settings, tmp_path):
    cleared = []

    def slow(_):
        try:
            yield Check("quick", lambda: {"a": 1})
            yield Check("slow", lambda: time.sleep(30) or {})
            yield Check("never", lambda: {"a": 1})
        finally:
            cleared.append(True)

    start = time.monotonic()
    record, content = done([Stage("slow", 0.2, slow), stage("next", dict), stage("last", dict)], settings, tmp_path)
    assert time.monotonic() - start < 15
    assert [(one["name"], one["status"]) for one in content["stages"][0]["checks"]] == [
        ("quick", "ok"),
        ("slow", "over time"),
    ]
    assert [one["status"] for one in content["stages"]] == ["over time", "ok", "ok"]
    assert cleared and not record.is_good


def test_a_stage_has_what_time_is_left(settings, tmp_path):
    given = []

    def note(stage_settings):
        given.append(stage_settings.seconds)
        yield Check("one", dict)

    stages = [stage("first", lambda: time.sleep(0.3) or {}), Stage("last", 20.0, note)]
    done(stages, Settings(**{**vars(settings), "seconds": 19.0}), tmp_path)
    assert 5 < given[0] < 18.7
    record, content = done(stages, Settings(**{**vars(settings), "seconds": 5.0}), tmp_path)
    assert content["stages"][1]["reason"] == "no time is left for it" and len(given) == 1 and record.is_good


def test_a_stage_that_cannot_begin_has_failed(settings, tmp_path):
    def broken(_):
        raise OSError("no room")
        yield

    record, content = done([Stage("broken", 20.0, broken), stage("next", dict)], settings, tmp_path)
    assert content["stages"][0] | {"traceback": "", "seconds": 0} == {
        "name": "broken",
        "status": "failed",
        "limit_seconds": 20.0,
        "checks": [],
        "error": "OSError: no room",
        "traceback": "",
        "seconds": 0,
    }
    assert not record.is_good


def test_the_file_says_what_is_under_way(settings, tmp_path):
    """A process that a kernel has hung, or killed, leaves that behind."""
    seen = []

    def look() -> dict:
        seen.append(json.loads((tmp_path / "found.json").read_text()))
        return {}

    done([stage("first", dict, look)], settings, tmp_path)
    (under_way,) = seen[0]["stages"]
    assert [check["status"] for check in under_way["checks"]] == ["ok", "running"]


def test_warnings_stand_with_the_check_that_gave_them(settings, tmp_path):
    def warn() -> dict:
        for _ in range(3):
            warnings.warn("is not compiled and runs slower", stacklevel=1)
        return {"a": 1.5}

    _, content = done([stage("first", warn)], settings, tmp_path)
    assert content["stages"][0]["checks"][0]["warnings"] == ["is not compiled and runs slower"]
    assert "  warning in 0: is not compiled and runs slower" in list(lines_of(content))
