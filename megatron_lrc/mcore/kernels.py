"""Which kernels compute the layers: Transformer Engine's or megatron-core's own modules, whose attention, and FP8.

Transformer Engine joins each layer's two RMSNorms to the linear layers behind them, adds weight gradients to the fp32
`main_grad` in the GEMM itself, and has FP8 GEMMs. The other modules that may not be installed (apex's or its fused
Adam) megatron-core finds by itself. On CUDA a run says at its start what was found, and warns of what is missing.

FP8 weights: Transformer Engine quantises a weight when a module's `is_first_microbatch` says so and keeps the result
beside the bf16 weight. megatron-core clears the flag after each forward pass, and its schedules set it, through the
stage (`PipelineStage.set_is_first_microbatch`), before a step's first micro-batch. So the student's weights are
quantised once for each time that they are composed, and the teacher's, whose flags only `load_weights` sets, once.
"""

import contextlib
import functools
import inspect
import os
import timeit
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fp8_utils import get_fp8_context, is_first_last_bf16_layer
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import get_te_version

from megatron_lrc.clone.products import WIDE_GEMM_TORCH, has_wide_gemm
from megatron_lrc.config import Config, ConfigError, ModelShape
from megatron_lrc.mcore.compiler import warn_of_compiler
from megatron_lrc.mcore.engine import INSTALL, broken_engine, too_old_for_recipe

#: FP8 recipe -> compute capability from which on there are kernels for it, and a GPU that has it. Transformer Engine's
#: own table (`quantization.py`), which it looks at in the first forward pass only.
_CAPABILITY = {
    "tensorwise": ((8, 9), "L4, L40S, H100"),
    "delayed": ((8, 9), "L4, L40S, H100"),
    "blockwise": ((9, 0), "H100"),
    "mxfp8": ((10, 0), "B200"),
}
#: Blockwise GEMMs came with it (the same table).
_BLOCKWISE_CUDA = (12, 9)
#: A release from which on `initialize_ub` has its present arguments, for messages.
_USERBUFFERS_VERSION = "2.7.0"
#: torch's names of dtypes, in the words of the flags.
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def engine_version() -> str | None:
    """Transformer Engine's; None where it is not installed or cannot be imported."""
    return str(get_te_version()) if HAVE_TE else None


def uses_transformer_engine(config: Config) -> bool:
    """By --transformer-impl auto not in fp32, which its GEMMs round to TF32 (`cublaslt_gemm.cu`)."""
    return config.compute.transformer_impl == "transformer_engine" or (_would_use_engine(config) and HAVE_TE)


def _would_use_engine(config: Config) -> bool:
    """Whether --transformer-impl auto takes Transformer Engine where it is installed."""
    is_half = config.training.bf16 or config.training.fp16
    return config.compute.transformer_impl == "auto" and is_half and torch.cuda.is_available()


def uses_engine_attention(config: Config, dtype: torch.dtype, shape: ModelShape) -> bool:
    """Whether Transformer Engine's attention is used, or that of `attention.py`. By --attention-backend auto
    only where its fast kernels apply and the results could be the same: not in fp32, nor document by
    document, nor with context parallelism (its ring attention has not been tried here). It has no soft caps."""
    backend = config.compute.attention_backend
    if (
        shape.attention_soft_cap
        or not uses_transformer_engine(config)
        or backend == "local"
        or config.data.reset_attention_mask
    ):
        return False
    is_half = torch.finfo(dtype).bits == 16
    return backend != "auto" or (is_half and config.parallel.context_parallel_size == 1)


def fuses_rotary_embedding(config: Config, dtype: torch.dtype) -> bool:
    """Whether Transformer Engine's kernel turns queries and keys (RoPE), once in fp32 and in one pass, instead of
    torch operations that round angles and products to `dtype`. It takes one table of angles for all sequences
    ([s, 1, 1, c]), so not where positions begin anew in each document."""
    is_half = torch.finfo(dtype).bits == 16
    return uses_transformer_engine(config) and is_half and not config.data.reset_position_ids


def fuse_weight_gradients(model: GPTModel) -> None:
    """Have Transformer Engine's GEMMs add to `main_grad`, which every weight that they reach must have by
    then. Set on its modules and not in TransformerConfig, where megatron-core's own output layer, which is
    not used here, would refuse it without apex's extension."""
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def own_precision(model: GPTModel, layer: int, inside: GPTModel) -> AbstractContextManager:
    """For a pass through part of a layer (from 0) of `model` in the middle of another model's: `model`'s own precision,
    where Transformer Engine would go on with the other's."""
    if inside.config.fp8 is None:
        return contextlib.nullcontext()
    if model.config.fp8 is not None and not is_first_last_bf16_layer(model.config, layer):
        return get_fp8_context(model.config, layer)
    from megatron.core.extensions.transformer_engine import fp8_autocast  # it has that name only where there is TE

    return fp8_autocast(enabled=False)


def start_userbuffers(config: Config, student: ModelShape, dtype: torch.dtype) -> None:
    """--tp-comm-overlap: make the buffers in which the student's layers exchange activations. Collective, after the
    process groups; `stop_userbuffers` undoes it.

    One set for the process, of one width, found by the names "qkv", "proj", "fc1", "fc2" that megatron-core gives to
    all layers whose configuration has `tp_comm_overlap`: so the student's only.
    """
    if not config.parallel.tp_comm_overlap:
        return
    from transformer_engine.pytorch.module import base  # type: ignore[import-not-found]

    tokens = config.training.micro_batch_size * config.training.seq_length // config.parallel.context_parallel_size
    base.initialize_ub(
        shape=[tokens, student.hidden_size],
        tp_size=config.parallel.tensor_model_parallel_size,
        quantization_modes=[base.UserBufferQuantizationMode.NONE],
        dtype=dtype,
        bootstrap_backend="nccl",
    )


def stop_userbuffers(config: Config) -> None:
    if config.parallel.tp_comm_overlap:
        from transformer_engine.pytorch.module import base  # type: ignore[import-not-found]

        base.destroy_ub()


def describe_kernels(config: Config, dtype: torch.dtype, shape: ModelShape, trained: str, optimizer: str) -> str | None:
    """For a run's first lines: what computes layers, attention, matrix products and the optimizer's step. None without
    CUDA, where there is no choice. shape: the student's. trained: what the trained model is called, `student` or
    `model`. optimizer: its kind."""
    if not torch.cuda.is_available():
        return None
    uses_engine = uses_transformer_engine(config)
    layers = f"Transformer Engine {get_te_version()}" if uses_engine else "megatron-core's own modules"
    attention = "its own" if uses_engine_attention(config, dtype, shape) else "torch's"
    overlap = ", the student's exchanges over TP beside its products" * config.parallel.tp_comm_overlap
    products = _describe_products(config, dtype, trained)
    return f"layers by {layers}, {attention} attention{overlap}; matrix products in {products}; {optimizer}"


def _describe_products(config: Config, dtype: torch.dtype, trained: str) -> str:
    name = _DTYPE_NAMES[dtype]
    if dtype == torch.float32:
        return f"{name}, rounded to TF32" if _rounds_to_tf32(config) else name
    if config.compute.fp8_format is not None:
        models = "teacher and student" if config.compute.teacher_fp8 else trained
        name += f", in the layers of {models} in FP8 ({config.compute.fp8_format}, {config.compute.fp8_recipe})"
    operands = _DTYPE_NAMES[dtype] if has_wide_gemm() else "widened"
    return f"{name}, logits in fp32 from {operands} operands"


def _rounds_to_tf32(config: Config) -> bool:
    """Whether fp32 operands are: by cuBLAS's own variable, which wins, or torch's setting, or Transformer Engine."""
    override = os.environ.get("NVIDIA_TF32_OVERRIDE")
    if override in ("0", "1"):
        return override == "1"
    return uses_transformer_engine(config) or torch.get_float32_matmul_precision() != "highest"


def warn_of_kernels(config: Config, dtype: torch.dtype) -> Iterator[str]:
    """For a run's first lines: what makes it slower than the machine could be, and the remedy."""
    is_half = torch.finfo(dtype).bits == 16
    if not torch.cuda.is_available():
        if is_half and (times := slowdown_on_cpu(dtype)) > 2:
            yield (
                f"products of matrices in {_DTYPE_NAMES[dtype]} take {times:.0f} times as long as in fp32 on this CPU, "
                f"which has no instructions for them. Leave --{_DTYPE_NAMES[dtype]} out here."
            )
        return
    if problem := broken_engine():
        yield problem
    elif _would_use_engine(config) and not HAVE_TE:
        yield (
            "Transformer Engine is not installed, so half precision computes slower: norms apart from the products "
            "behind them, weight gradients added up in a pass of their own, torch's optimizer unless apex is there. "
            f"{INSTALL} --transformer-impl local says that this is meant."
        )
    if is_half and not has_wide_gemm():
        yield (
            f"torch {torch.__version__} has no product of half-precision matrices with an fp32 result "
            "(torch.ops.aten.mm.dtype), so logits and pull back are computed from operands widened to fp32, which "
            f"is slower. Install torch {WIDE_GEMM_TORCH} or newer."
        )
    if problem := warn_of_compiler():
        yield problem


def slowdown_on_cpu(dtype: torch.dtype) -> float:
    """How many times as long as in fp32 a product of matrices takes, by the best of a few; measured in some 0.1 s."""
    left, right = torch.ones(256, 512), torch.ones(512, 512)
    times = {}
    for one in (torch.float32, dtype):
        product = functools.partial(torch.nn.functional.linear, left.to(one), right.to(one))
        product()
        times[one] = min(timeit.repeat(product, number=1, repeat=5))
    return times[dtype] / times[torch.float32]


def choose_determinism(config: Config) -> None:
    """--deterministic-mode, for torch, cuBLAS and Transformer Engine. To be called before CUDA is used."""
    if not config.compute.deterministic_mode:
        return
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # megatron-core asks for it by this name too
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs one of two, by torch's documentation
    torch.use_deterministic_algorithms(True, warn_only=True)


def check_machine(config: Config) -> None:
    """ConfigError if this machine lacks what the flags ask for: Transformer Engine, a GPU, one that has FP8."""
    compute = config.compute
    needs = [f"--transformer-impl {compute.transformer_impl}"] * (compute.transformer_impl == "transformer_engine")
    needs += [f"--attention-backend {compute.attention_backend}"] * (compute.attention_backend not in ("auto", "local"))
    needs += [f"--fp8-format {compute.fp8_format}"] * (compute.fp8_format is not None)
    needs += ["--tp-comm-overlap"] * config.parallel.tp_comm_overlap
    if needs and not torch.cuda.is_available():
        raise ConfigError(f"{needs[0]} needs Transformer Engine and a CUDA GPU; there is no GPU here. Leave it out.")
    if (problem := broken_engine()) and (needs or _would_use_engine(config)):
        raise ConfigError(f"{problem} With --transformer-impl local a run does without it.")
    if not needs:
        return
    if not HAVE_TE:
        raise ConfigError(
            f"{needs[0]} needs the package transformer-engine, which is not installed here. {INSTALL} Or leave the "
            "flag out."
        )
    if problem := too_old_for_recipe(config):
        raise ConfigError(problem)
    if config.parallel.tp_comm_overlap and not _has_userbuffers():
        raise ConfigError(
            f"--tp-comm-overlap needs Transformer Engine {_USERBUFFERS_VERSION}; {get_te_version()} is installed. "
            "Install a newer one, or leave the flag out."
        )
    if compute.fp8_format is not None:
        device = int(os.environ.get("LOCAL_RANK", "0"))
        _check_capability(compute.fp8_recipe, torch.cuda.get_device_capability(device))


def _has_userbuffers() -> bool:
    """Whether `initialize_ub` takes what `start_userbuffers` gives. Development versions do not tell."""
    from transformer_engine.pytorch.module import base  # type: ignore[import-not-found]

    return "quantization_modes" in inspect.signature(base.initialize_ub).parameters


def _check_capability(recipe: str, capability: tuple[int, int]) -> None:
    least, example = _CAPABILITY[recipe]
    if capability < least:
        possible = [name for name, (needed, _) in _CAPABILITY.items() if needed <= capability]
        remedy = f"Use --fp8-recipe {' or '.join(possible)}." if possible else "Leave --fp8-format out."
        raise ConfigError(
            f"--fp8-recipe {recipe} needs a GPU of compute capability {least[0]}.{least[1]} ({example}); this one has "
            f"{capability[0]}.{capability[1]}. {remedy}"
        )
    if recipe == "mxfp8" and capability >= (12, 0):
        raise ConfigError(
            "--fp8-recipe mxfp8 has no kernels for a GPU of compute capability "
            f"{capability[0]}.{capability[1]} yet. Use --fp8-recipe tensorwise."
        )
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if recipe == "blockwise" and cuda < _BLOCKWISE_CUDA:
        raise ConfigError(
            f"--fp8-recipe blockwise needs CUDA 12.9; this torch was built for {torch.version.cuda}. Install a newer "
            "one, or use --fp8-recipe tensorwise."
        )
