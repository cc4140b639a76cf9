"""Two engines compute the same model, layer by layer; whatever an export gets wrong, their logits differ."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import random_student
from transformers import AutoModelForCausalLM

from checkpoints import write_run
from hf_teachers import WRITERS, write_llama, write_llama_with_biases, write_mistral, write_qwen2, write_qwen3
from megatron_lrc.hf import export
from megatron_lrc.hf.comparison import compare_logits
from megatron_lrc.hf.families import describe_teacher, rope_inverse_frequencies
from megatron_lrc.hf.forward import HuggingFaceModel, fixed_tokens
from megatron_lrc.hf.output_folder import copy_files
from megatron_lrc.hf.teacher import TeacherReader
from megatron_lrc.verify.sources import stream_logits, teacher_weights
from tools_path import convert_to_hf, load_tool

VOCAB, HIDDEN = 301, 28
TOKENS = fixed_tokens(VOCAB)
verify_model: Callable[[list[str]], int] = load_tool("verify_model").main

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


# ------------------------------------------------------------------------------------------------ the two engines


@families
@either_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layer_by_layer_transformers_gives_the_logits_of_its_whole_model(
    tmp_path: Path, write: Callable, is_tied: bool, dtype: torch.dtype
) -> None:
    write(tmp_path, is_tied=is_tied, dtype=dtype, num_layers=3)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(TOKENS).logits
    found = HuggingFaceModel(tmp_path).logits(TOKENS)
    assert (found - expected).abs().max() < 1e-6
    assert expected.std() > 0.1


def test_layer_by_layer_transformers_reads_sharded_files_and_lets_go_of_every_layer(tmp_path: Path) -> None:
    write_llama(tmp_path / "one")
    write_llama(tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    sharded = HuggingFaceModel(tmp_path / "many")
    assert torch.equal(sharded.logits(TOKENS), HuggingFaceModel(tmp_path / "one").logits(TOKENS))
    assert [weight.numel() for weight in sharded._model.model.layers.parameters()] == [0] * 18


@families
@either_head
def test_both_engines_agree_about_every_family(tmp_path: Path, write: Callable, is_tied: bool) -> None:
    """In fp32 to rounding; in fp64 to 1e-9, so that the difference in fp32 is rounding and nothing else."""
    write(tmp_path, is_tied=is_tied)
    teacher = describe_teacher(tmp_path)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        weights = teacher_weights(TeacherReader(teacher))
        ours = stream_logits(weights, teacher.shape, rope_inverse_frequencies(teacher), TOKENS, dtype)
        difference = compare_logits(ours, HuggingFaceModel(tmp_path).logits(TOKENS, dtype))
        assert difference.is_within(tolerance) and difference.top1_agreement == 1.0, (dtype, difference)


def test_the_fixed_tokens_are_spread_over_the_whole_vocabulary() -> None:
    for vocab_size in (301, 32000, 151936):
        tokens = fixed_tokens(vocab_size).flatten().sort().values
        assert tokens.unique().numel() == 128 and 0 <= tokens[0] and tokens[-1] < vocab_size
        assert tokens.diff().max() < 3 * vocab_size / 128


def test_logits_that_are_not_finite_are_never_within_a_tolerance() -> None:
    logits = torch.randn(2, 3, 5)
    assert compare_logits(logits, logits.clone()).is_within(0.0)
    broken = logits.clone()
    broken[1, 2, 3] = torch.nan
    assert not compare_logits(logits, broken).is_within(1e30)
    assert not compare_logits(broken, broken).is_within(1e30)


# ------------------------------------------------------------------------------------------------ sound exports


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


# ------------------------------------------------------------------------------------------------ broken exports


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory: Path, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


def swap_rows_of_q(directory: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors["model.layers.1.self_attn.q_proj.weight"]
        weight[[0, 1]] = weight[[1, 0]]

    change_weights(directory, swap)


def swap_gate_and_up(directory: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    change_weights(directory, swap)


def zero_a_bias(directory: Path) -> None:
    change_weights(directory, lambda tensors: tensors["model.layers.1.self_attn.k_proj.bias"][:3].zero_())


def give_o_a_bias(directory: Path) -> None:
    change_weights(directory, lambda tensors: tensors["model.layers.1.self_attn.o_proj.bias"][:1].fill_(0.01))


def reset_a_norm_of_q(directory: Path) -> None:
    change_weights(directory, lambda tensors: tensors["model.layers.0.self_attn.q_norm.weight"].fill_(1.0))


def forget_rope_scaling(directory: Path) -> None:
    change_config(directory, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rope_scaling=None)


def change_rope_theta(directory: Path) -> None:
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    change_config(directory, rope_parameters=rope | {"rope_theta": 500000.0}, rope_theta=500000.0)


def halve_the_heads(directory: Path) -> None:
    """Every tensor keeps its shape."""
    change_config(directory, head_dim=8, num_attention_heads=8, num_key_value_heads=4)


def change_head_dim(directory: Path) -> None:
    change_config(directory, head_dim=8)


def change_the_epsilon(directory: Path) -> None:
    change_config(directory, rms_norm_eps=1e-3)


def say_tied(directory: Path) -> None:
    """As a writer would that takes the student for a tied one: the LM head is not in the file either."""
    change_config(directory, tie_word_embeddings=True)
    change_weights(directory, lambda tensors: tensors.pop("lm_head.weight") and None)


def say_untied(directory: Path) -> None:
    change_config(directory, tie_word_embeddings=False)


def lose_a_tensor(directory: Path) -> None:
    change_weights(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight") and None)


DIFFERENT_LOGITS, NOT_LOADED = 1, 2  # exit codes of verify_model.py
BROKEN = [
    (write_llama, False, swap_rows_of_q, DIFFERENT_LOGITS),
    (write_llama, False, swap_gate_and_up, DIFFERENT_LOGITS),
    (write_llama, False, forget_rope_scaling, DIFFERENT_LOGITS),
    (write_llama, False, change_rope_theta, DIFFERENT_LOGITS),
    (write_llama, False, halve_the_heads, DIFFERENT_LOGITS),
    (write_llama, False, change_the_epsilon, DIFFERENT_LOGITS),
    (write_llama, False, say_tied, DIFFERENT_LOGITS),
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
    damage(tmp_path / "student")
    assert verify(run, tmp_path / "student") == code
    printed = capsys.readouterr()
    assert ("The models DIFFER" in printed.out) == (code == DIFFERENT_LOGITS)
    assert (str(tmp_path / "student") in printed.err) == (code == NOT_LOADED)


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
    def copy_and_damage(source: Path, target: Path) -> None:
        copy_files(source, target)
        damage(target)

    write_student(tmp_path, write, is_tied=is_tied)
    monkeypatch.setattr(export, "copy_files", copy_and_damage)
    assert convert(tmp_path) == 2
    printed = capsys.readouterr()
    assert "fails its self-check" in printed.err and printed.err.count("\n") == 1
    assert ("its logits are not those" in printed.err) == (code == DIFFERENT_LOGITS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "teacher"]
    assert convert(tmp_path, "--no-verify") == 0


# ------------------------------------------------------------------------------------------------ users' errors


def test_other_vocabularies_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("small", 301), ("large", 303)):
        write_llama(tmp_path / name, vocab_size=size)
    assert verify(tmp_path / "small", tmp_path / "large") == 2
    error = capsys.readouterr().err
    assert "a vocabulary of 301" in error and "one of 303" in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", ["absent", "empty", "file"])
def test_what_is_no_model_is_named(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "model")
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    if kind == "file":
        path.write_text("")
    assert verify(tmp_path / "model", path) == 2
    error = capsys.readouterr().err
    assert f"{path} " in error and "no model" in error and error.count("\n") == 1


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
