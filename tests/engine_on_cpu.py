"""Transformer Engine on a CPU: its real modules, built there, and a stand-in for the arithmetic that needs a GPU.

A process that has imported this module before megatron_lrc.mcore builds models of Transformer Engine's own classes, as
megatron-core wraps them. The stand-in keeps to what megatron_lrc relies on, read from Transformer Engine 2.20:

* a weight is quantised, and the result kept, when a module is told that it is the first micro-batch (or has none yet);
* with fused weight gradients the first micro-batch's product overwrites `main_grad`, the later ones add to it, and
  autograd gets nothing, or a tensor without meaning where the weight has `grad_added_to_main_grad`;
* which precision is on is a global state; delayed scaling notes maxima in every pass, and makes scales of them in
  those with gradients.

Run as a program it calls one of the functions below: `python engine_on_cpu.py FUNCTION JSON`.
"""

import json
import os
import sys
import types
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.common.recipe import DelayedScaling
from transformer_engine.pytorch import quantization
from transformer_engine.pytorch.module import base
from transformer_engine.pytorch.quantization import FP8GlobalStateManager, autocast

#: (what, module's name in its model, "teacher" or "student" or a model's width) -> how often.
COUNTS: Counter[str] = Counter()


class _Torch(types.ModuleType):
    """torch, but that there seems to be a GPU, which is the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = types.SimpleNamespace(is_available=lambda: True)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


base.torch, quantization.torch = _Torch(), _Torch()
quantization.torch.device = lambda name: torch.device("cpu" if name == "cuda" else name)  # of delayed scaling's state
quantization.get_device_compute_capability = lambda: (9, 0)
sys.modules["transformer_engine.pytorch.optimizers"] = None  # type: ignore[assignment]  # megatron-core uses torch's

from megatron.core.extensions import transformer_engine as extensions  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)


def rounded(tensor: Tensor, scale: Tensor | None = None) -> Tensor:
    """As FP8 (e4m3) with one scale holds it."""
    wide = tensor.detach().float()
    scale = 448.0 / wide.abs().amax().clamp_min(1e-12) if scale is None else scale
    return ((wide * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale).to(tensor.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, leaf: Tensor, weight: Tensor, used: Tensor, fuses: bool, is_first: Any
    ) -> Tensor:
        ctx.save_for_backward(weight, used)
        ctx.leaf, ctx.fuses, ctx.is_first = leaf, fuses, is_first
        return used @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, inputs = ctx.saved_tensors
        dgrad = grads[0] @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dgrad, None, None, None, None, None
        wgrad = grads[0].flatten(0, -2).t() @ inputs.flatten(0, -2)
        if ctx.fuses:
            ctx.leaf.main_grad.copy_(wgrad) if ctx.is_first else ctx.leaf.main_grad.add_(wgrad)
            wgrad = None
            if hasattr(ctx.leaf, "grad_added_to_main_grad"):
                ctx.leaf.grad_added_to_main_grad = True
                wgrad = torch.full_like(ctx.leaf, torch.nan)
        return dgrad, wgrad, None, None, None, None


def _multiply(module: Any, inputs: Tensor, is_first: bool | None) -> Tensor:
    module.init_fp8_metadata(num_gemms=1)
    weight, used = module.weight.detach(), inputs.detach()
    width = f"{tuple(module.weight.shape)}"
    COUNTS[f"{'fp8' if module.fp8 else 'bf16'} product {width}"] += 1
    if module.fp8:
        scales = (None, None)
        if module.fp8_meta["recipe"].delayed():
            state = module.fp8_meta["scaling_fwd"]
            maxima = torch.stack([used.abs().amax().float(), weight.abs().amax().float()])
            state.amax_history[0, :2] = torch.maximum(state.amax_history[0, :2], maxima)
            scales = state.scale[:2].clone().unbind()
            if torch.is_grad_enabled():
                state.scale[:2] = 448.0 / state.amax_history[:, :2].amax(0).clamp_min(1e-12)
                state.amax_history.copy_(state.amax_history.roll(1, 0))
                state.amax_history[0].zero_()
        kept = module._fp8_workspaces.get("weight")
        if is_first is None or is_first or kept is None:
            COUNTS[f"quantised {width}"] += 1
            kept = module._fp8_workspaces["weight"] = rounded(weight, scales[1])
        weight, used = kept, rounded(used, scales[0])
    output = _Product.apply(inputs, module.weight, weight, used, module.fuse_wgrad_accumulation, is_first)
    return output if not module.use_bias else output + module.bias


def _linear(module: Any, inputs: Tensor, is_first_microbatch: bool | None = None, **_: Any) -> Tensor:
    """Row parallel: each rank's product is a partial sum."""
    output = _multiply(module, inputs, is_first_microbatch)
    return reduce_scatter_to_sequence_parallel_region(output) if module.sequence_parallel else output


def _norm_and_linear(module: Any, inputs: Tensor, is_first_microbatch: bool | None = None, **_: Any) -> Tensor:
    """Column parallel: each rank's part of the sequence is normed, then the whole is multiplied."""
    gain = module.layer_norm_weight
    normed = F.rms_norm(inputs, gain.shape, gain, module.eps)
    if module.sequence_parallel:
        normed = gather_from_sequence_parallel_region(normed)
    return _multiply(module, normed, is_first_microbatch)


def _norm(module: Any, inputs: Tensor) -> Tensor:
    return F.rms_norm(inputs, module.weight.shape, module.weight, module.eps)


def _checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    """te.checkpoint without the random states of CUDA: recomputed in the precision of the first pass."""
    for name in ("distribute_saved_activations", "get_rng_state_tracker", "tp_group"):
        kwargs.pop(name)
    enabled, recipe = FP8GlobalStateManager.is_fp8_enabled(), FP8GlobalStateManager.quantization_state.fp8_recipe

    def run(*inputs: Any) -> Any:
        with autocast(enabled=enabled, recipe=recipe):
            return function(*inputs, **kwargs)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=True)


def _turn(t: Tensor, freqs: Tensor, *, tensor_format: str, interleaved: bool, fused: bool) -> Tensor:
    """RoPE of [s, b, heads, c] by one table of angles [s, 1, 1, c], in fp32 and rounded once, as the kernel does. Whole
    heads only: the kernel takes a smaller table too, and rotates as many features."""
    assert fused and not interleaved and tensor_format == "sbhd"
    assert freqs.shape == (len(t), 1, 1, t.shape[-1]) and freqs.dtype == torch.float32
    wide = t.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * freqs.cos() + torch.cat((-second, first), dim=-1) * freqs.sin()).to(t.dtype)


def stand_in() -> None:
    """Let Transformer Engine's modules compute on the CPU."""
    extensions.apply_rotary_pos_emb = _turn
    te.Linear.forward, te.LayerNormLinear.forward, te.RMSNorm.forward = _linear, _norm_and_linear, _norm
    te.distributed.checkpoint = _checkpoint
    quantization.check_fp8_support = lambda: (True, "")
    quantization.get_default_fp8_recipe = DelayedScaling


# ------------------------------------------------------------------------------------------------- what the tests call


def build(teacher: str, impl: str, **settings: Any) -> Any:
    """The one stage of a small paired, or single, model."""
    import torch.distributed as dist

    from built_stages import build_stages
    from megatron_lrc.config import Config
    from megatron_lrc.hf.families import describe_teacher
    from megatron_lrc.hf.teacher import TeacherReader
    from megatron_lrc.mcore import distributed

    config = Config()
    config.model.teacher, config.model.student_hidden_size = teacher, 32
    config.training.seq_length = 16
    config.compute.transformer_impl = impl  # type: ignore[assignment]
    dtype = getattr(torch, settings.pop("dtype", "bfloat16"))
    is_single = settings.pop("is_single", False)
    for name, value in settings.items():
        section = next(part for part in (config.compute, config.data, config.parallel) if hasattr(part, name))
        setattr(section, name, value)
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        build.groups = distributed.start(config)  # type: ignore[attr-defined]
    description = describe_teacher(teacher)
    if is_single:
        config.model.method, config.model.student = "ordinary", teacher
        return build_stages(config, description, TeacherReader(description), build.groups, dtype, is_new=True)[0]
    return build_stages(config, description, TeacherReader(description), build.groups, dtype)[0]


def train(settings: dict[str, Any]) -> dict[str, int]:
    """A training run by the real loop; how often each thing was done."""
    from megatron_lrc.config import Config, validate
    from megatron_lrc.mcore.distributed import world_size
    from megatron_lrc.methods import method_of
    from megatron_lrc.train import loop

    stand_in()
    loop.check_machine = lambda config: None
    config = Config.from_dict(settings)
    validate(method_of(config), world_size=world_size())
    loop.train(config.resolved(world_size()))
    return dict(COUNTS)


def main() -> None:
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    import engine_cases

    result = getattr(engine_cases, name)(**arguments)
    if os.environ.get("RANK", "0") == "0":
        print("result:", json.dumps(result))


if __name__ == "__main__":
    sys.modules["engine_on_cpu"] = sys.modules["__main__"]
    main()
