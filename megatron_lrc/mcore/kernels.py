"""Which kernels compute the layers: Transformer Engine's or megatron-core's own modules, whose attention, and FP8.

Transformer Engine joins each layer's two RMSNorms to the linear layers behind them, adds weight gradients to the fp32
`main_grad` in the GEMM itself, and has FP8 GEMMs. The other modules that may not be installed (apex's or its fused
Adam) megatron-core finds by itself.

FP8 weights: Transformer Engine quantises a weight when a module's `is_first_microbatch` says so and keeps the result
beside the bf16 weight. megatron-core clears the flag after each forward pass, and its schedules set it, through the
stage (`PipelineStage.set_is_first_microbatch`), before a step's first micro-batch. So the student's weights are
quantised once for each time that they are composed, and the teacher's, whose flags only `load_weights` sets, once.
"""

import contextlib
import os
from contextlib import AbstractContextManager

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fp8_utils import get_fp8_context, is_first_last_bf16_layer
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import get_te_version, is_te_min_version

from megatron_lrc.config import Config, ConfigError, ModelShape

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
#: `initialize_ub` has its present arguments from it on.
_USERBUFFERS_VERSION = "2.7.0"


def engine_version() -> str | None:
    """Transformer Engine's; None where it is not installed or cannot be imported."""
    return str(get_te_version()) if HAVE_TE else None


def uses_transformer_engine(config: Config) -> bool:
    """By --transformer-impl auto not in fp32, which its GEMMs round to TF32 (`cublaslt_gemm.cu`)."""
    wanted, is_half = config.compute.transformer_impl, config.training.bf16 or config.training.fp16
    return wanted == "transformer_engine" or (wanted == "auto" and is_half and HAVE_TE and torch.cuda.is_available())


def uses_engine_attention(config: Config, dtype: torch.dtype) -> bool:
    """Whether Transformer Engine's attention is used, or that of `attention.py`. By --attention-backend auto
    only where its fast kernels apply and the results could be the same: not in fp32, nor document by
    document, nor with context parallelism (its ring attention has not been tried here)."""
    backend = config.compute.attention_backend
    if not uses_transformer_engine(config) or backend == "local" or config.data.reset_attention_mask:
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


def describe_kernels(config: Config, dtype: torch.dtype, trained: str) -> str | None:
    """For a run's first lines; None where megatron-core's own layers compute, as everywhere without a GPU.
    trained: what the trained model is called, `student` or `model`."""
    if not uses_transformer_engine(config):
        return None
    compute, attention = config.compute, "its own" if uses_engine_attention(config, dtype) else "torch's"
    line = f"layers by Transformer Engine {get_te_version()}, {attention} attention"
    if config.parallel.tp_comm_overlap:
        line += ", the student's exchanges over TP beside its products"
    if compute.fp8_format is None:
        return line
    models = "teacher and student" if compute.teacher_fp8 else trained
    return f"{line}; {models} in FP8, {compute.fp8_format}, {compute.fp8_recipe}"


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
    if not needs:
        return
    if not torch.cuda.is_available():
        raise ConfigError(f"{needs[0]} needs Transformer Engine and a CUDA GPU; there is no GPU here. Leave it out.")
    if not HAVE_TE:
        raise ConfigError(
            f"{needs[0]} needs the package transformer-engine, which is not installed here (or cannot be imported). "
            "Install it: pip install 'megatron-lrc[cuda]'; or leave the flag out."
        )
    if config.parallel.tp_comm_overlap and not is_te_min_version(_USERBUFFERS_VERSION):
        raise ConfigError(
            f"--tp-comm-overlap needs Transformer Engine {_USERBUFFERS_VERSION}; {get_te_version()} is installed. "
            "Install a newer one, or leave the flag out."
        )
    if compute.fp8_format is not None:
        device = int(os.environ.get("LOCAL_RANK", "0"))
        _check_capability(compute.fp8_recipe, torch.cuda.get_device_capability(device))


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
