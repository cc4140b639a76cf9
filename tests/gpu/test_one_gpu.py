"""What only a GPU can show: its results are the CPU's, Transformer Engine's are the local ones, bf16 and every FP8
recipe stay near, and a run goes on from its checkpoint bit for bit.

Limits are those of the arithmetic: fp32 sums in another order; TF32, which Transformer Engine takes for fp32, rounds to
1/2048, bf16 to 1/256, FP8 (e4m3) to 1/16.
"""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from gpu_runs import difference, last_loss, train, write_teacher

from megatron_lrc.config import ConfigError
from tiny_data import write_counting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

LOCAL, ENGINE = "--transformer-impl local", "--transformer-impl transformer_engine"
RECIPES = ("tensorwise", "blockwise", "mxfp8", "delayed")
LONG = 200


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> tuple[str, str, Path]:
    """Teacher, data, and a folder for runs."""
    folder = tmp_path_factory.mktemp("gpu")
    return write_teacher(folder / "teacher"), write_counting(folder / "text"), folder


@pytest.fixture(scope="session")
def trained(place):
    """`trained(flags, steps, on_cpu=False)` -> records, each run made once."""
    teacher, data, folder = place

    @cache
    def trained(flags: str, steps: int, *, on_cpu: bool = False) -> list[dict]:
        name = f"{steps}{'-cpu' * on_cpu}-{flags.replace('--', '').replace(' ', '-')}"
        return train(folder / name, teacher, data, steps, flags, on_cpu=on_cpu)

    return trained


def skip_without_kernels(recipe: str) -> None:
    from megatron_lrc.mcore.kernels import _check_capability

    try:
        _check_capability(recipe, torch.cuda.get_device_capability())
    except ConfigError as problem:
        pytest.skip(str(problem))


def test_fp32_losses_and_gradients_are_the_cpus(trained, measured):
    measured("fp32, GPU against CPU", difference(trained(LOCAL, 3), trained(LOCAL, 3, on_cpu=True)), 1e-3)


def test_transformer_engine_gives_what_the_local_layers_give(trained, measured, needs_engine):
    measured("fp32 (TF32), Transformer Engine against local", difference(trained(ENGINE, 3), trained(LOCAL, 3)), 1e-2)
    bf16 = difference(trained(f"{ENGINE} --bf16", 3), trained(f"{LOCAL} --bf16", 3))
    measured("bf16, Transformer Engine against local", bf16, 3e-2)


def test_fused_weight_gradients_are_those_without(trained, measured, needs_engine):
    fused, plain = (trained(f"{ENGINE} --bf16 {flag}", 3) for flag in ("", "--no-gradient-accumulation-fusion"))
    measured("bf16, fused weight gradients against autograd's", difference(fused, plain), 2e-2)


@pytest.mark.parametrize("backend", ["flash", "fused", "unfused"])
def test_each_attention_gives_what_the_local_one_gives(trained, measured, needs_engine, backend):
    if backend == "flash":
        pytest.importorskip("flash_attn")
    found = trained(f"{ENGINE} --bf16 --attention-backend {backend}", 3)
    expected = trained(f"{ENGINE} --bf16 --attention-backend local", 3)
    measured(f"bf16, --attention-backend {backend} against local", difference(found, expected), 3e-2)


def test_ordinary_training_gives_what_the_local_layers_give(trained, measured, needs_engine):
    flags = "--method ordinary --init random --init-method-std 0.02 --bf16"
    found, expected = (trained(f"{impl} {flags}", 3) for impl in (ENGINE, LOCAL))
    measured("ordinary, bf16, Transformer Engine against local", difference(found, expected, ("loss",)), 3e-2)


@pytest.mark.parametrize("recompute", ["full", "selective --recompute-modules core_attn mlp"])
@pytest.mark.parametrize("fp8", ["", "--fp8-format hybrid", "--fp8-format hybrid --teacher-fp8"])
def test_recomputation_changes_nothing(trained, measured, needs_engine, recompute, fp8):
    if fp8:
        skip_without_kernels("tensorwise")
    flags = f"{ENGINE} --bf16 {fp8}".strip()
    found = trained(f"{flags} --recompute-granularity {recompute}", 3)
    measured(f"{fp8 or 'bf16'}, recompute {recompute.split()[0]}", difference(found, trained(flags, 3)), 1e-2)


def test_bf16_learns_as_fp32_does(trained, measured, needs_engine):
    bf16, fp32 = last_loss(trained(f"{ENGINE} --bf16", LONG)), last_loss(trained(LOCAL, LONG))
    measured(f"bf16 against fp32: loss after {LONG} steps", abs(bf16 / fp32 - 1), 2e-2)


@pytest.mark.parametrize("teacher", ["", "--teacher-fp8"], ids=["student", "both"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_learns_as_bf16_does(trained, measured, needs_engine, recipe, teacher):
    skip_without_kernels(recipe)
    if recipe == "delayed" and teacher:
        pytest.skip("refused: a frozen teacher's scales would never be updated")
    fp8 = last_loss(trained(f"{ENGINE} --bf16 --fp8-format hybrid --fp8-recipe {recipe} {teacher}".strip(), LONG))
    bf16 = last_loss(trained(f"{ENGINE} --bf16", LONG))
    assert math.isfinite(fp8)
    measured(f"FP8 {recipe} {teacher[2:]} against bf16: loss after {LONG} steps", abs(fp8 / bf16 - 1), 5e-2)


@pytest.mark.parametrize("flags", [LOCAL, f"{ENGINE} --bf16", *(f"{ENGINE} --bf16 --fp8-recipe {r}" for r in RECIPES)])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(place, measured, request, flags):
    if ENGINE in flags:
        request.getfixturevalue("needs_engine")
    if "fp8" in flags:
        skip_without_kernels(flags.split()[-1])
        flags += " --fp8-format hybrid"
    flags += " --deterministic-mode"
    teacher, data, folder = place
    name = request.node.name.replace("/", "-")
    whole = train(folder / f"{name} whole".replace(" ", "-"), teacher, data, 6, flags)
    parts = folder / f"{name} parts".replace(" ", "-")
    train(parts, teacher, data, 3, flags)
    again = train(parts, teacher, data, 6, f"{flags} --load auto")
    measured(f"resumed against whole, {flags}", difference(again, whole), 0.0)


def test_a_checkpoint_goes_from_the_local_layers_to_transformer_engine(place, measured, trained, needs_engine):
    teacher, data, folder = place
    run = folder / "both-impls"
    train(run, teacher, data, 3, LOCAL)
    found = train(run, teacher, data, 6, f"{ENGINE} --load auto")
    measured("local, then Transformer Engine, against local", difference(found, trained(LOCAL, 6)), 1e-2)
