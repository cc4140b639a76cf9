"""--student-norm-epsilon: a checkpoint remembers it, the export has it, and methods without a new student refuse it."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from checkpoints import write_run
from hf_teachers import write_qwen3
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.methods import method_of
from megatron_lrc.train.start_checks import check
from runs import make_config
from students import load, logits_of, random_student
from tools_path import convert_to_hf

EPSILON = 0.02


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and a run whose student has another epsilon."""
    folder = tmp_path_factory.mktemp("epsilon")
    write_qwen3(folder / "teacher")
    teacher = describe_teacher(folder / "teacher")
    write_run(folder / "run", teacher, *random_student(teacher, 24, has_lm_head=True), epsilon=EPSILON)
    return folder


def test_the_export_computes_with_the_students_epsilon(folder):
    """The conversion itself compares the logits of both engines."""
    assert convert_to_hf(["--load", str(folder / "run"), "--output", str(folder / "student")]) == 0
    assert json.loads((folder / "student/config.json").read_text())["rms_norm_eps"] == EPSILON
    student = load(folder / "student")
    other = AutoModelForCausalLM.from_pretrained(folder / "student", rms_norm_eps=3e-5).eval()
    assert (logits_of(student) - logits_of(other)).abs().max() > 1e-3


def test_another_epsilon_cannot_continue_a_run(folder, tiny_text):
    config = make_config(str(folder / "teacher"), tiny_text, folder / "new", steps=3)
    config.checkpoint.load, config.model.student_norm_epsilon = str(folder / "run"), EPSILON
    assert check(config.resolved(1), 1).state.step == 3
    config.model.student_norm_epsilon = None
    with pytest.raises(ConfigError) as caught:
        check(config.resolved(1), 1)
    size = "24 (untied), 2 layers, 2 KV groups, 80 FFN neurons"
    assert f"of hidden size {size}, norm epsilon 0.02; the flags ask for {size}, 3e-05." in str(caught.value)


def config_of(method: str, **model: object) -> Config:
    config = Config()
    for name, value in {"method": method, "student_norm_epsilon": 1e-5, **model}.items():
        setattr(config.model, name, value)
    return config


def test_only_a_new_student_may_have_an_epsilon_of_its_own(folder):
    shape = describe_teacher(folder / "teacher").shape
    for method in ("lrc", "logits", "tinybert", "ordinary"):
        new = config_of(method, teacher=str(folder / "teacher"), student_hidden_size=24)
        assert method_of(new).student_shape(shape).norm_epsilon == 1e-5 != shape.norm_epsilon
        assert not list(method_of(new).check())
    (error,) = method_of(config_of("ordinary", student=str(folder / "teacher"))).check()
    assert "is the model to train, in its own shape: --student-norm-epsilon cannot go with it" in error
    pruned = config_of("sheared", teacher=str(folder / "teacher"), student_hidden_size=24)
    (error,) = method_of(pruned).check()
    assert error.startswith("--student-norm-epsilon 1e-05 cannot go with --method sheared")
