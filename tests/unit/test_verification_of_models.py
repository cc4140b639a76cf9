"""An export has the logits of its run; whatever is wrong with it, verification finds it and nothing is kept."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints import write_run
from damage import (
    change_config,
    change_head_dim,
    change_rope_theta,
    change_the_epsilon,
    forget_rope_scaling,
    give_o_a_bias,
    halve_the_heads,
    lose_a_tensor,
    reset_a_norm_of_q,
    say_tied,
    say_tied_beside_an_lm_head,
    say_untied,
    swap_gate_and_up,
    swap_rows_of_q,
    zero_a_bias,
)
from hf_teachers import WRITERS, write_llama, write_llama_with_biases, write_mistral, write_qwen2, write_qwen3
from megatron_lrc.config import ConfigError
from megatron_lrc.hf import export
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.mcore.layer_by_layer import LayerByLayer
from megatron_lrc.verify.open_models import check_conversion
from students import random_student
from tools_path import convert_to_hf, tool_main

HIDDEN = 28
verify_model: Callable[[list[str]], int] = tool_main("verify_model")
convert_from_hf: Callable[[list[str]], int] = tool_main("convert_from_hf")

families = pytest.mark.parametrize("write", WRITERS)
either_head = pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])


def write_student(folder: Path, write: Callable, *, is_tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A teacher and a run directory with a student of it, in `folder`; the run."""
    write(folder / "teacher", is_tied=is_tied)
    teacher = describe_teacher(folder / "teacher")
    projections, norms = random_student(teacher, HIDDEN, has_lm_head=not is_tied, dtype=dtype)
    write_run(folder / "run", teacher, projections, norms)
    return folder / "run"


def convert(folder: Path, *flags: str) -> int:
    return convert_to_hf(["--load", str(folder / "run"), "--output", str(folder / "student"), *flags])


def verify(*arguments: Path | str) -> int:
    return verify_model([str(argument) for argument in arguments])


def last_line(text: str) -> str:
    """What the tool itself says: transformers may have told of its own troubles before."""
    return text.splitlines()[-1]


# ------------------------------------------------------------------------------------------------ sound exports


def damage_what_is_written(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """Have exports damaged between the last weight and their verification."""
    write_model = export.write_model

    def write_and_damage(directory: Path, *arguments, **named) -> None:
        write_model(directory, *arguments, **named)
        damage(directory)

    monkeypatch.setattr(export, "write_model", write_and_damage)


@families
@either_head
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_agrees_with_its_run(
    tmp_path: Path, write: Callable, is_tied: bool, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_student(tmp_path, write, is_tied=is_tied)
    assert convert(tmp_path, "--dtype", dtype) == 0
    assert "logits: largest difference" in capsys.readouterr().out
    assert verify(run, tmp_path / "student") == 0
    assert verify(tmp_path / "student", run / "iter_0000003", "--dtype", "float64") == 0
    printed = capsys.readouterr().out
    assert f"2 layers, hidden size {HIDDEN}, vocabulary 301, weights in {dtype}" in printed
    assert "top-1 agreement: 100.0 %" in printed


def test_a_run_in_bf16_is_exported_as_it_was_composed(tmp_path: Path) -> None:
    run = write_student(tmp_path, write_llama, dtype=torch.bfloat16)
    assert convert(tmp_path) == 0
    assert verify(run, tmp_path / "student") == 0


@pytest.mark.parametrize("damage", [None, swap_rows_of_q])
def test_a_model_that_amplifies_rounding_is_still_told_from_a_wrong_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sharp attention over eight layers moves fp32 logits by a thousandth, in transformers itself.

    The engines may round alike, as they do on some processors: here every weight of down is a neighbour of its in fp32.
    """
    fill = LayerByLayer._fill

    def fill_rounded(self: LayerByLayer, name: str, weight: torch.Tensor) -> None:
        if self.dtype == torch.float32 and name == "down":
            weight = torch.nextafter(weight.float(), torch.randn_like(weight, dtype=torch.float32) * torch.inf)
        fill(self, name, weight)

    monkeypatch.setattr(LayerByLayer, "_fill", fill_rounded)
    write_llama(tmp_path / "teacher", num_layers=8)
    teacher = describe_teacher(tmp_path / "teacher")
    projections, norms = random_student(teacher, HIDDEN, has_lm_head=True)
    for name in projections:
        projections[name] *= 3 if name.endswith((".q", ".k")) else 1
    run = write_run(tmp_path / "run", teacher, projections, norms)
    if damage:
        damage_what_is_written(monkeypatch, damage)
    assert convert(tmp_path) == (2 if damage else 0)
    printed = capsys.readouterr().out
    assert ("That is rounding" in printed) == (not damage)
    if not damage:
        assert verify(run, tmp_path / "student") == 1
        assert verify(run, tmp_path / "student", "--dtype", "float64") == 0


# ------------------------------------------------------------------------------------------------ converted teachers


@families
@either_head
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_converted_teacher_agrees_with_its_hugging_face_directory(
    tmp_path: Path, write: Callable, is_tied: bool, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    original, converted = tmp_path / "teacher", tmp_path / "converted"
    write(original, is_tied=is_tied)
    assert convert_from_hf(["--hf-model", str(original), "--output", str(converted), "--dtype", dtype]) == 0
    check_conversion(original, converted, getattr(torch, dtype))
    assert "logits: largest difference" in capsys.readouterr().out
    assert verify(original, converted) == (0 if dtype == "float32" else 1)
    assert f"converted for megatron-core, 2 layers, hidden size 48, vocabulary 301, weights in {dtype}" in (
        capsys.readouterr().out
    )


def test_the_check_of_a_conversion_finds_another_model(tmp_path: Path) -> None:
    write_llama(tmp_path / "teacher")
    converted = tmp_path / "converted"
    assert convert_from_hf(["--hf-model", str(tmp_path / "teacher"), "--output", str(converted)]) == 0
    change_rope_theta(converted)
    with pytest.raises(ConfigError, match="its logits in megatron-core are not those of"):
        check_conversion(tmp_path / "teacher", converted)


# ------------------------------------------------------------------------------------------------ broken exports


DIFFERENT_LOGITS, NOT_LOADED = 1, 2  # exit codes of verify_model.py
BROKEN = [
    (write_llama, False, swap_rows_of_q, DIFFERENT_LOGITS),
    (write_llama, False, swap_gate_and_up, DIFFERENT_LOGITS),
    (write_llama, False, forget_rope_scaling, DIFFERENT_LOGITS),
    (write_llama, False, change_rope_theta, DIFFERENT_LOGITS),
    (write_llama, False, halve_the_heads, DIFFERENT_LOGITS),
    (write_llama, False, change_the_epsilon, DIFFERENT_LOGITS),
    (write_llama, False, say_tied, DIFFERENT_LOGITS),
    (write_llama, False, say_tied_beside_an_lm_head, NOT_LOADED),
    (write_llama, False, change_head_dim, NOT_LOADED),
    (write_llama, False, lose_a_tensor, NOT_LOADED),
    (write_llama, True, say_untied, NOT_LOADED),
    (write_llama_with_biases, False, zero_a_bias, DIFFERENT_LOGITS),
    (write_llama_with_biases, False, give_o_a_bias, DIFFERENT_LOGITS),
    (write_mistral, True, swap_rows_of_q, DIFFERENT_LOGITS),
    (write_qwen2, False, zero_a_bias, DIFFERENT_LOGITS),
    (write_qwen2, False, change_rope_theta, DIFFERENT_LOGITS),
    (write_qwen3, True, reset_a_norm_of_q, DIFFERENT_LOGITS),
    (write_qwen3, False, halve_the_heads, NOT_LOADED),
]
broken = pytest.mark.parametrize(
    ("write", "is_tied", "damage", "code"),
    BROKEN,
    ids=[f"{write.__name__[6:]}-{damage.__name__}" for write, _, damage, _ in BROKEN],
)


@broken
def test_verify_model_tells_a_damaged_export_from_its_run(
    tmp_path: Path, write: Callable, is_tied: bool, damage: Callable, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_student(tmp_path, write, is_tied=is_tied)
    assert convert(tmp_path) == 0
    assert verify(run, tmp_path / "student") == 0
    damage(tmp_path / "student")
    capsys.readouterr()
    assert verify(run, tmp_path / "student") == code
    printed = capsys.readouterr()
    assert ("The models DIFFER" in printed.out) == (code == DIFFERENT_LOGITS)
    if code == NOT_LOADED:
        error = last_line(printed.err)
        assert error.startswith("verify_model.py: ") and str(tmp_path / "student") in error


@broken
def test_an_export_that_is_written_wrong_fails_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable,
    is_tied: bool,
    damage: Callable,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_student(tmp_path, write, is_tied=is_tied)
    damage_what_is_written(monkeypatch, damage)
    assert convert(tmp_path) == 2
    error = last_line(capsys.readouterr().err)
    assert error.startswith("convert_to_hf.py: The exported student fails its self-check: ")
    assert ("its logits are not those" in error) == (code == DIFFERENT_LOGITS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "teacher"]
    assert convert(tmp_path, "--no-verify") == 0


# ------------------------------------------------------------------------------------------------ users' errors


def test_other_vocabularies_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("small", 301), ("large", 303)):
        write_llama(tmp_path / name, vocab_size=size)
    assert verify(tmp_path / "small", tmp_path / "large") == 2
    error = last_line(capsys.readouterr().err)
    assert error.startswith("verify_model.py: ") and "a vocabulary of 301" in error and "one of 303" in error


@pytest.mark.parametrize("kind", ["absent", "empty", "file"])
def test_what_is_no_model_is_named(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "model")
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    if kind == "file":
        path.write_text("")
    assert verify(tmp_path / "model", path) == 2
    error = last_line(capsys.readouterr().err)
    assert error.startswith(f"verify_model.py: {path} ") and "no model" in error


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures ['GPT2LMHeadModel']"),
        ({"hidden_size": "wide"}, "transformers cannot load"),
    ],
    ids=["architecture", "config"],
)
def test_a_directory_that_cannot_be_computed_is_named(
    tmp_path: Path, config: dict, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_llama(tmp_path)
    change_config(tmp_path, **config)
    assert verify(tmp_path, tmp_path) == 2
    error = last_line(capsys.readouterr().err)
    assert error.startswith("verify_model.py: ") and words in error and str(tmp_path) in error


def test_the_tolerance_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "exact")
    write_llama(tmp_path / "rounded", dtype=torch.bfloat16)
    models = tmp_path / "exact", tmp_path / "rounded"
    assert verify(*models) == 1
    assert verify(*models, "--tolerance", "0.2") == 0
    assert verify(*models, "--tolerance", "-1") == 2
    assert "--tolerance" in capsys.readouterr().err


def test_another_teacher_than_that_of_the_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_student(tmp_path, write_llama)
    write_llama(tmp_path / "other", is_tied=True)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    assert verify(run, run, "--teacher", tmp_path / "other") == 2
    assert "is not the teacher" in capsys.readouterr().err
    assert verify(run, run, "--teacher", tmp_path / "moved") == 0
