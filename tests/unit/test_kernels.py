"""Kernels and FP8 where there is neither Transformer Engine nor a GPU: what is refused, and fused gradients."""

import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from config_cases import SMOLLM2, change, errors_of
from megatron_lrc.clone.fusion import compile_nothing
from megatron_lrc.clone.projections import accumulate_in_fp32, gradient_of, zero_gradient
from megatron_lrc.commands.main import main
from megatron_lrc.config import Config, ConfigError, validate, validate_against_teacher
from megatron_lrc.estimate.peak_memory import peak_memory
from megatron_lrc.mcore import engine, kernels
from megatron_lrc.mcore.compat import set_step
from megatron_lrc.mcore.gpt_models import transformer_config
from megatron_lrc.methods import method_of

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said where there is no GPU")
FP8 = {"fp8_format": "hybrid", "bf16": True}
TP_OVERLAP = {"tp_comm_overlap": True, "bf16": True, "tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"fp8_format": "e4m3"}, "--fp8-format e4m3 needs --bf16"),
        ({"fp8_format": "e4m3", "fp16": True}, "--fp8-format e4m3 needs --bf16"),
        (FP8 | {"transformer_impl": "local"}, "--fp8-format hybrid needs Transformer Engine"),
        ({"fp8_recipe": "blockwise"}, "--fp8-recipe blockwise means nothing without --fp8-format"),
        ({"teacher_fp8": True}, "--teacher-fp8 means nothing without --fp8-format"),
        (FP8 | {"fp8_amax_history_len": 16}, "means nothing without --fp8-recipe delayed"),
        (FP8 | {"fp8_amax_compute_algo": "max"}, "--fp8-amax-compute-algo max means nothing without"),
        (FP8 | {"num_layers_at_end_in_bf16": 2}, "2 means nothing without --first-last-layers-bf16"),
        (FP8 | {"fp8_recipe": "delayed", "first_last_layers_bf16": True}, "--first-last-layers-bf16 cannot go with"),
        (FP8 | {"fp8_recipe": "delayed", "teacher_fp8": True}, "--teacher-fp8 cannot go with --fp8-recipe delayed"),
        (TP_OVERLAP | {"tensor_model_parallel_size": 1}, "--tp-comm-overlap means nothing without --tensor-model"),
        (TP_OVERLAP | {"transformer_impl": "local"}, "--tp-comm-overlap is Transformer Engine's, which"),
        (TP_OVERLAP | {"bf16": False}, "--tp-comm-overlap needs half precision"),
        (TP_OVERLAP | FP8, "--tp-comm-overlap cannot go with --fp8-format hybrid"),
        ({"attention_backend": "fused"}, "--attention-backend fused has no kernels for fp32"),
        ({"attention_backend": "unfused", "transformer_impl": "local"}, "--attention-backend unfused is Transformer"),
        ({"attention_backend": "unfused", "reset_attention_mask": True}, "cannot go with --reset-attention-mask"),
    ],
)
def test_flags_that_cannot_go_together_are_refused_with_one_line(valid_config, values, expected):
    change(valid_config, **values)
    (error,) = errors_of(validate, method_of(valid_config), world_size=valid_config.parallel.tensor_model_parallel_size)
    assert expected in error


@pytest.mark.parametrize(
    ("values", "wrong", "multiple"),
    [
        ({"student_hidden_size": 392}, "392 hidden features of the student", 16),
        ({"student_hidden_size": 400, "fp8_recipe": "mxfp8"}, "400 hidden features of the student", 32),
        ({"seq_length": 2056}, "2056 tokens of a micro-batch on a process", 16),
        (
            {"seq_length": 72, "tensor_model_parallel_size": 3, "sequence_parallel": True},
            "24 tokens of a micro-batch on a process (--micro-batch-size times --seq-length, over 3)",
            16,
        ),
        ({"num_layers_at_start_in_bf16": 31, "first_last_layers_bf16": True}, "31 is more than the 30 layers", 16),
    ],
)
def test_sizes_that_fp8_products_cannot_have_are_named(valid_config, values, wrong, multiple):
    change(valid_config, **FP8, **values)
    (error,) = errors_of(validate_against_teacher, method_of(valid_config), SMOLLM2)
    assert wrong in error and ("multiples" not in error or f"needs multiples of {multiple};" in error)


def test_the_published_student_of_the_fixture_can_be_trained_in_fp8(valid_config):
    for recipe in ("tensorwise", "blockwise", "mxfp8", "delayed"):
        change(valid_config, **FP8, fp8_recipe=recipe)
        validate(method_of(valid_config))
        assert validate_against_teacher(method_of(valid_config), SMOLLM2) == []


@pytest.mark.parametrize(
    ("recipe", "capability", "expected"),
    [
        ("tensorwise", (8, 0), "compute capability 8.9 (L4, L40S, H100); this one has 8.0. Leave --fp8-format out."),
        (
            "blockwise",
            (8, 9),
            "compute capability 9.0 (H100); this one has 8.9. Use --fp8-recipe tensorwise or delayed",
        ),
        ("mxfp8", (9, 0), "this one has 9.0. Use --fp8-recipe tensorwise or delayed or blockwise."),
        ("mxfp8", (12, 0), "no kernels for a GPU of compute capability 12.0 yet"),
        ("tensorwise", (9, 0), None),
        ("delayed", (8, 9), None),
        ("mxfp8", (10, 0), None),
    ],
)
def test_a_recipe_that_the_gpu_has_no_kernels_for_is_refused(recipe, capability, expected):
    if expected is None:
        kernels._check_capability(recipe, capability)
        return
    with pytest.raises(ConfigError, match=re.escape(expected)):
        kernels._check_capability(recipe, capability)


@without_gpu
@pytest.mark.parametrize(
    "flags",
    ["--transformer-impl transformer_engine", "--fp8-format e4m3 --bf16", "--attention-backend flash --bf16"],
)
def test_what_needs_a_gpu_is_refused_in_one_sentence_before_anything_is_built(
    tiny_llama, tiny_text, tmp_path, capsys, flags
):
    run = tmp_path / "run"
    common = (
        f"--teacher {tiny_llama()} --student-hidden-size 32 --data-path {tiny_text} --split 90,10,0 --seq-length 16"
    )
    assert main(["train", *common.split(), "--train-iters", "1", "--save", str(run), *flags.split()]) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    needed = " ".join(flags.split()[:2])
    assert error == f"error: {needed} needs Transformer Engine and a CUDA GPU; there is no GPU here. Leave it out."
    assert not run.exists()


@without_gpu
def test_userbuffers_are_refused_without_a_gpu(valid_config):
    change(valid_config, **TP_OVERLAP)
    with pytest.raises(ConfigError, match="^--tp-comm-overlap needs Transformer Engine and a CUDA GPU"):
        kernels.check_machine(valid_config)


@without_gpu
def test_a_dry_run_of_fp8_needs_no_gpu(tiny_llama, tiny_text, capsys):
    common = (
        f"--teacher {tiny_llama()} --student-hidden-size 32 --data-path {tiny_text} --split 90,10,0 --seq-length 16"
    )
    flags = "--train-iters 1 --fp8-format e4m3 --bf16 --teacher-fp8 --transformer-impl transformer_engine --dry-run"
    assert main(["train", *common.split(), *flags.split()]) == 0
    assert "nothing was started" in capsys.readouterr().out


# ------------------------------------------------------------------------- what is said at the start, as if on CUDA


@pytest.fixture
def on_gpu(monkeypatch, valid_config):
    """A configuration in bf16 on a machine that has a GPU, as far as anybody asks torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return changed(valid_config, bf16=True)


def changed(config: Config, **values: object) -> Config:
    change(config, **values)
    return config


def with_engine(monkeypatch, version: str, initialize_ub: Callable = lambda: None) -> None:
    """Transformer Engine of some version, as far as megatron-core and `kernels` ask for it."""
    monkeypatch.setattr(kernels, "HAVE_TE", True)
    monkeypatch.setattr(kernels, "get_te_version", lambda: Version(version))
    monkeypatch.setattr(engine, "installed_version", lambda: Version(version))
    for name in ("", ".pytorch", ".pytorch.module"):
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", types.ModuleType("fake"))
    module = types.SimpleNamespace(base=types.SimpleNamespace(initialize_ub=initialize_ub))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module", module)


def test_a_start_on_cuda_says_what_computes_without_transformer_engine(on_gpu, monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    own = "layers by megatron-core's own modules, torch's attention; matrix products in"
    line = kernels.describe_kernels(on_gpu, torch.bfloat16, SMOLLM2, "student", "torch's AdamW")
    assert line == f"{own} bf16, logits in fp32 from bf16 operands; torch's AdamW"
    change(on_gpu, bf16=False)
    line = kernels.describe_kernels(on_gpu, torch.float32, SMOLLM2, "student", "apex's FusedAdam")
    assert line == f"{own} fp32; apex's FusedAdam"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    line = str(kernels.describe_kernels(on_gpu, torch.float32, SMOLLM2, "student", "x"))
    assert f"{own} fp32, rounded to TF32; " in line


def test_a_start_on_cuda_says_what_computes_with_transformer_engine(on_gpu, monkeypatch):
    with_engine(monkeypatch, "2.4.0+3cd6870")
    line = kernels.describe_kernels(on_gpu, torch.bfloat16, SMOLLM2, "student", "Transformer Engine's FusedAdam")
    assert line == (
        "layers by Transformer Engine 2.4.0+3cd6870, its own attention; matrix products in bf16, logits in fp32 from "
        "bf16 operands; Transformer Engine's FusedAdam"
    )
    change(on_gpu, fp8_format="hybrid", attention_backend="local")
    line = str(kernels.describe_kernels(on_gpu, torch.bfloat16, SMOLLM2, "student", "x"))
    assert "torch's attention; matrix products in bf16, in the layers of student in FP8 (hybrid, tensorwise), " in line
    assert list(kernels.warn_of_kernels(on_gpu, torch.bfloat16)) == []


def test_capped_scores_are_torchs_to_compute(on_gpu, monkeypatch):
    with_engine(monkeypatch, "2.4.0")
    capped = replace(SMOLLM2, attention_soft_cap=50.0)
    assert ", torch's attention; " in str(kernels.describe_kernels(on_gpu, torch.bfloat16, capped, "student", "x"))
    change(on_gpu, attention_backend="flash")
    with pytest.raises(ConfigError, match="--attention-backend flash cannot cap the scores of attention"):
        validate_against_teacher(method_of(on_gpu), capped)


@without_gpu
def test_without_cuda_a_slow_half_precision_is_all_there_is_to_say(valid_config, monkeypatch):
    assert kernels.describe_kernels(valid_config, torch.float32, SMOLLM2, "student", "torch's AdamW") is None
    half = changed(valid_config, bf16=True)
    monkeypatch.setattr(kernels, "slowdown_on_cpu", lambda dtype: 7.6)
    (warning,) = kernels.warn_of_kernels(half, torch.bfloat16)
    assert "products of matrices in bf16 take 8 times as long as in fp32 on this CPU" in warning and "--bf16" in warning
    assert list(kernels.warn_of_kernels(valid_config, torch.float32)) == []
    monkeypatch.setattr(kernels, "slowdown_on_cpu", lambda dtype: 0.7)
    assert list(kernels.warn_of_kernels(half, torch.bfloat16)) == []


def test_the_slowdown_of_half_precision_is_measured():
    assert 0.01 < kernels.slowdown_on_cpu(torch.bfloat16) < 1000


def test_half_precision_without_transformer_engine_is_a_warning_with_the_remedy(on_gpu):
    (warning,) = kernels.warn_of_kernels(on_gpu, torch.bfloat16)
    assert "is not installed" in warning and "pip install --no-build-isolation 'megatron-lrc[cuda]'" in warning
    assert list(kernels.warn_of_kernels(changed(on_gpu, transformer_impl="local"), torch.bfloat16)) == []
    change(on_gpu, transformer_impl="auto", bf16=False)
    assert list(kernels.warn_of_kernels(on_gpu, torch.float32)) == []


def test_a_torch_without_wide_products_is_a_warning(on_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "has_wide_gemm", lambda: False)
    change(on_gpu, transformer_impl="local")
    (warning,) = kernels.warn_of_kernels(on_gpu, torch.bfloat16)
    assert warning.startswith(f"torch {torch.__version__} has no product") and warning.endswith("2.8 or newer.")
    assert "logits in fp32 from widened operands" in str(
        kernels.describe_kernels(on_gpu, torch.bfloat16, SMOLLM2, "model", "x")
    )
    assert list(kernels.warn_of_kernels(changed(on_gpu, bf16=False), torch.float32)) == []


def test_without_a_compiler_both_fusions_are_off_and_that_is_said(on_gpu):
    change(on_gpu, transformer_impl="local")

    def fusions() -> tuple[bool, bool]:
        built = transformer_config(on_gpu, SMOLLM2, torch.bfloat16, is_trained=True)
        return built.bias_activation_fusion, built.bias_dropout_fusion

    assert fusions() == (True, True)
    compile_nothing("on rank 3 (host-b): Failed to find C compiler")
    try:
        assert fusions() == (False, False)
        (warning,) = kernels.warn_of_kernels(on_gpu, torch.bfloat16)
    finally:
        compile_nothing(None)
    assert warning.startswith("torch.compile does not work on rank 3 (host-b): Failed to find C compiler. So")


def test_a_broken_transformer_engine_is_refused_wherever_it_would_be_used(on_gpu, monkeypatch):
    monkeypatch.setattr(engine, "_problem", "Transformer Engine 2.4.0 is installed but broken.")
    for flags in ({}, {"bf16": False, "transformer_impl": "transformer_engine"}):
        with pytest.raises(ConfigError, match="but broken. With --transformer-impl local a run does without it"):
            kernels.check_machine(changed(on_gpu, **flags))
    change(on_gpu, bf16=True, transformer_impl="local")
    kernels.check_machine(on_gpu)
    assert list(kernels.warn_of_kernels(on_gpu, torch.bfloat16)) == [
        "Transformer Engine 2.4.0 is installed but broken."
    ]


def test_what_needs_transformer_engine_says_how_to_install_it(on_gpu):
    with pytest.raises(ConfigError, match=r"^--fp8-format hybrid needs .* pip install --no-build-isolation"):
        kernels.check_machine(changed(on_gpu, fp8_format="hybrid"))


def test_a_recipe_that_is_newer_than_transformer_engine_is_refused_at_start(on_gpu, monkeypatch):
    with_engine(monkeypatch, "2.2.0")
    with pytest.raises(
        ConfigError, match=r"^--fp8-recipe blockwise needs Transformer Engine 2.3.0; 2.2.0 is installed"
    ):
        kernels.check_machine(changed(on_gpu, fp8_format="hybrid", fp8_recipe="blockwise"))


def test_userbuffers_are_asked_for_their_arguments_and_not_for_a_version(on_gpu, monkeypatch):
    change(on_gpu, **TP_OVERLAP)
    with_engine(monkeypatch, "2.7.0.dev0+5fdd7bb", lambda shape, tp_size, quantization_modes: None)
    kernels.check_machine(on_gpu)
    with_engine(monkeypatch, "2.6.0", lambda shape, tp_size, use_fp8: None)
    with pytest.raises(ConfigError, match=r"^--tp-comm-overlap needs Transformer Engine 2.7.0; 2.6.0 is installed"):
        kernels.check_machine(on_gpu)


def test_fp8_copies_of_the_layers_are_part_of_the_memory(valid_config):
    change(valid_config, bf16=True, global_batch_size=1)
    student = method_of(valid_config).student_shape(SMOLLM2)
    (before,) = peak_memory(valid_config, SMOLLM2, student, world_size=1)
    change(valid_config, fp8_format="e4m3", teacher_fp8=True)
    (after,) = peak_memory(valid_config, SMOLLM2, student, world_size=1)
    of_width = 30 * (960 + 576 + 3 * 1536)  # elements of all layers' matrices, for each hidden feature
    assert after.teacher - before.teacher == 576 * of_width
    assert after.student - before.student == 2 * 384 * of_width


# -------------------------------------------------------------------------------------------- gradient accumulation


class Product(torch.autograd.Function):
    """x @ w with w's gradient left to autograd, or added to `main_grad` as Transformer Engine does it."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, fuses: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.leaf, ctx.fuses = w, fuses
        return x @ w

    @staticmethod
    def backward(ctx, *grads: Tensor):
        grad = ctx.saved_tensors[0].t() @ grads[0]
        if ctx.fuses:
            ctx.leaf.main_grad.add_(grad)
            grad = None
            if hasattr(ctx.leaf, "grad_added_to_main_grad"):
                ctx.leaf.grad_added_to_main_grad = True
                grad = torch.full_like(ctx.leaf, torch.nan)
        return None, grad, None


@pytest.mark.parametrize("has_mark", [False, True], ids=["None", "marked"])
def test_gradients_that_a_product_adds_itself_are_added_once(has_mark):
    """In the order of a step: fused, plain (a tied head), fused."""
    weight = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    accumulate_in_fp32(weight)
    if has_mark:
        weight.grad_added_to_main_grad = False
    for _ in range(2):
        zero_gradient(weight)
        for fuses, row in ((True, 1.0), (False, 2.0), (True, 4.0)):
            Product.apply(torch.full((1, 3), row, dtype=torch.bfloat16), weight, fuses).sum().backward()
            assert weight.grad is None
        gathered = gradient_of(weight)
        assert gathered.dtype == torch.float32 and torch.equal(gathered, torch.full((3, 2), 7.0))


def test_an_adam_goes_on_counting_where_it_was():
    """torch's counts steps for each parameter; others, as Transformer Engine's, for each group."""
    weight = torch.nn.Parameter(torch.ones(2))
    adam, other = torch.optim.AdamW([weight]), torch.optim.SGD([weight])
    weight.grad = torch.ones(2)
    adam.step()
    for optimizer in (adam, other):
        set_step(optimizer, 7)
    assert adam.state[weight]["step"] == 7 and "step" not in adam.param_groups[0]
    assert other.param_groups[0]["step"] == 7 and not other.state
