"""Kernels and FP8 where there is neither Transformer Engine nor a GPU: what is refused, and fused gradients."""

import re

import pytest
import torch
from torch import Tensor

from config_cases import SMOLLM2, change, errors_of
from megatron_lrc.clone.projections import accumulate_in_fp32, gradient_of, zero_gradient
from megatron_lrc.commands.main import main
from megatron_lrc.config import ConfigError, validate, validate_against_teacher
from megatron_lrc.estimate.peak_memory import peak_memory
from megatron_lrc.mcore import kernels
from megatron_lrc.mcore.compat import set_step
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
