"""A method is asked in one place: `method_of` gives the object, and nobody else wants to know which one it is."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from config_cases import SMOLLM2
from megatron_lrc.checkpoints import run_directory
from megatron_lrc.config import MATRICES, SETTINGS, Config
from megatron_lrc.methods import METHODS, Method, method_of

ROOT = Path(__file__).parents[2]
QUESTIONS = re.compile(
    r"is_sheared|is_tinybert|is_clone|has_teacher|opened_at|pruned_at"
    r"|isinstance\([^)]*(PairedModel|ShearedModel|SingleModel|TinyBertLosses)"
)


def method_named(name: str) -> Method:
    config = Config()
    config.model.method, config.model.student_hidden_size = name, 384  # type: ignore[assignment]
    config.training.train_iters = 100
    return method_of(config)


def test_every_choice_of_the_flag_is_a_method_and_no_other():
    assert tuple(METHODS) == SETTINGS["method"].choices


def test_asking_a_method_loads_no_torch():
    program = "import sys; from megatron_lrc.methods import method_of; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_hardly_anybody_else_asks_which_method_runs():
    files = [path for part in ("megatron_lrc", "tools", "benchmarks") for path in (ROOT / part).rglob("*.py")]
    inside = (ROOT / "megatron_lrc" / "methods", ROOT / "megatron_lrc" / "config")
    asked = [
        path.relative_to(ROOT)
        for path in files
        if not any(path.is_relative_to(folder) for folder in inside)
        for line in path.read_text(encoding="utf-8").splitlines()
        if QUESTIONS.search(line)
    ]
    assert len(asked) <= 10 and Path("megatron_lrc/train/loop.py") not in asked, asked


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_its_student_is_and_what_of_it_is_trained(name):
    method = method_named(name)
    student = method.student_shape(SMOLLM2)
    assert student.hidden_size == 384 and replace(student, hidden_size=SMOLLM2.hidden_size) == SMOLLM2
    assert method.own_matrices(has_changed=False) == (frozenset() if name == "lrc" else frozenset(MATRICES))
    assert "384" in method.title
    assert "trained: 2.5M parameters" in method.headline(SMOLLM2, student, 2_500_000, has_changed=False)
    origin = method.origin("Teacher", SMOLLM2, 7 if name == "sheared" else None)
    assert "`Teacher`" in origin.origin and origin.licence.endswith(".")


def test_only_what_changes_during_a_run_has_a_step_for_it():
    steps = {name: method_named(name).change_step for name in METHODS}
    assert steps == {"lrc": None, "ordinary": None, "logits": None, "tinybert": None, "sheared": 30}
    opened = method_named("lrc")
    opened.config.projection.open_after, opened.config.projection.open_lr = 0.25, 3e-3
    assert opened.change_step == 25
    assert opened.config_of_phase(has_changed=False).optimizer.lr == Config().optimizer.lr
    assert opened.config_of_phase(has_changed=True).optimizer.lr == 3e-3
    opened.config.projection.open_after = 0
    assert opened.change_step == 0 and opened.title.endswith(", opened at once")
    (line,) = opened.describe_trained(lambda has_changed: 2_000_000 if has_changed else 1_000_000)
    assert line == "trained: 2.0M parameters of the student's own, from the first step on"
    assert "multiplied by projections (`--init random`;" in opened.origin("Teacher", SMOLLM2, 0).origin
    with pytest.raises(NotImplementedError):
        method_named("ordinary").describe_change(SMOLLM2, 1)


@pytest.mark.parametrize("name", ["opened_at", "pruned_at", "changed_at"])
@pytest.mark.parametrize("step", [None, 4])
def test_a_checkpoint_of_an_older_version_says_when_its_method_changed(name, step):
    others = {"opened_at": None, "pruned_at": None} if name != "changed_at" else {}
    state = run_directory.with_names_of_today({"step": 9, **others, name: step})
    assert run_directory.RunState(**state) == run_directory.RunState(step=9, changed_at=step, has_least_warmup=False)
