"""What `unit/test_transformer_engine.py` has done in processes of their own, where Transformer Engine comes first."""

from types import SimpleNamespace
from typing import Any

import torch

import engine_on_cpu
from engine_on_cpu import build

ENGINE, LOCAL = "transformer_engine", "local"


def names(teacher: str) -> dict[str, Any]:
    """What the two layer specs call their parts: everything that the package finds by name."""
    from megatron_lrc.clone.sites import CAPTURED_LINEARS
    from megatron_lrc.mcore.gpt_models import layer_input_norms, layers_of, norm_gains, residual_readers

    found: dict[str, Any] = {}
    for impl in (LOCAL, ENGINE):
        stage, single = build(teacher, impl), build(teacher, impl, is_single=True)
        layers = [layer for _, layer in layers_of(stage.student)]
        found[impl] = {
            "trained": [_describe(trained) for trained in stage.trained()],
            "trained alone": [_describe(trained) for trained in single.trained()],
            "pairs": [
                (weight.projection, weight.site.name, list(weight.teacher.shape), list(weight.student.shape))
                for weight in stage.cloned_weights
            ],
            "gains": {name: list(gain.shape) for name, gain in norm_gains(stage.teacher).items()},
            "readers": len(list(residual_readers(stage.teacher))),
            "input norms": [index for index, _ in layer_input_norms(stage.teacher)],
            "hooks": [
                len(layer.get_submodule(linear)._forward_hooks) for layer in layers for linear in CAPTURED_LINEARS
            ],
            "has gradients": sum(parameter.requires_grad for parameter in stage.student.parameters()),
        }
        found[f"{impl} modules"] = sorted({type(module).__name__ for module in engine_modules(stage.student)})
    return found


def engine_modules(model: torch.nn.Module) -> list[Any]:
    """Transformer Engine's linear layers."""
    return [module for module in model.modules() if hasattr(module, "is_first_microbatch")]


def _describe(trained: Any) -> list[Any]:
    place = trained.layer and list(trained.layer)
    shape = list(trained.parameter.shape)
    return [trained.name, trained.key, shape, list(trained.groups), trained.split, place, trained.is_gated]


@torch.no_grad()
def values(teacher: str) -> dict[str, bool]:
    """A teacher that is read, and a student that is composed of it, are the same with either spec, bit for bit."""
    from megatron_lrc.mcore.gpt_models import norm_gains

    both = {impl: build(teacher, impl) for impl in (LOCAL, ENGINE)}
    generator = torch.Generator().manual_seed(3)
    projections = {
        name: torch.randn(48, 32, generator=generator) for name, _ in both[LOCAL].projections.named_matrices()
    }
    for stage in both.values():
        for name, matrix in projections.items():
            stage.projections.set_matrix(name, matrix.to(torch.bfloat16))
        stage.compose()
    local, engine = both[LOCAL], both[ENGINE]
    pairs = [pair for pair in zip(local.cloned_weights, engine.cloned_weights, strict=True) if not pair[0].is_looked_up]
    gains, engine_gains = norm_gains(local.teacher), norm_gains(engine.teacher)
    frozen = [
        (model.state_dict(), other.state_dict())
        for model, other in zip(local.models.values(), engine.models.values(), strict=True)
    ]
    kept = [
        name
        for name in frozen[0][0]
        if name.endswith("bias") or "q_layernorm.weight" in name or "k_layernorm.weight" in name
    ]
    return {
        "teacher": all(torch.equal(one.teacher, other.teacher) for one, other in pairs),
        "student": all(torch.equal(one.student, other.student) and one.student.any() for one, other in pairs),
        "gains": all(torch.equal(gain, engine_gains[name]) for name, gain in gains.items()),
        "frozen": all(torch.equal(one[name], other[name]) for one, other in frozen for name in kept),
    }


def construction(teacher: str) -> dict[str, Any]:
    """How modules are set up by the flags."""
    from megatron_lrc.mcore.gpt_models import layers_of

    def fused(stage: Any) -> dict[str, list[bool]]:
        return {
            name: sorted({module.fuse_wgrad_accumulation for module in engine_modules(model)})
            for name, model in stage.models.items()
        }

    def attention(**settings: Any) -> str:
        (_, layer), *_ = layers_of(build(teacher, ENGINE, **settings).student)
        return type(layer.self_attention.core_attention).__name__

    stage = build(teacher, ENGINE)
    layer = next(layer for _, layer in layers_of(stage.student))
    norms = [layer.self_attention.linear_qkv, layer.mlp.linear_fc1, stage.student.decoder.final_layernorm]
    if stage.shapes.student.has_qk_norm:
        norms += [layer.self_attention.q_layernorm, layer.self_attention.k_layernorm]
    return {
        "epsilons": sorted({norm.eps for norm in norms}),
        "fused": fused(stage),
        "fused when told not to": fused(build(teacher, ENGINE, gradient_accumulation_fusion=False)),
        "fused in fp32": fused(build(teacher, ENGINE, dtype="float32")),
        "attention": attention(),
        "attention in fp32": attention(dtype="float32"),
        "attention, documents apart": attention(reset_attention_mask=True),
        "attention, local": attention(attention_backend="local"),
    }


def userbuffers(teacher: str) -> dict[str, Any]:
    """--tp-comm-overlap: which buffers Transformer Engine makes, and which modules exchange activations in them.

    Its own code, but for the buffers themselves, and NCCL.
    """
    from unittest.mock import patch

    from transformer_engine.pytorch.module import base

    from megatron_lrc.mcore import kernels

    ways = ("ub_overlap_ag_fprop", "ub_overlap_rs_fprop", "ub_overlap_ag_dgrad", "ub_bulk_dgrad", "ub_bulk_wgrad")
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    without = build(teacher, ENGINE, **layout)  # starts the process groups
    config, student = without.settings, without.shapes.student
    config.parallel.tp_comm_overlap = True
    made: list[tuple[list[int], str]] = []

    def make(shape: list[int], dtype: torch.dtype, *_: Any, **__: Any) -> SimpleNamespace:
        made.append((shape, str(dtype)))
        return SimpleNamespace(is_fp8_ubuf=lambda: False, with_cublasmp=lambda: False)

    def initialize(bootstrap_backend: str, **settings: Any) -> None:
        assert bootstrap_backend == "nccl"
        initialize_ub(bootstrap_backend="gloo", **settings)

    initialize_ub = base.initialize_ub
    with (
        patch.multiple(base.tex, CommOverlap=make, CommOverlapP2P=make, CommOverlapHelper=lambda *groups: None),
        patch.multiple(
            base.tex, device_supports_multicast=lambda: True, get_stream_priority_range=lambda: (0, 0), create=True
        ),
        patch.object(base, "initialize_ub", initialize),
    ):
        kernels.start_userbuffers(config, student, torch.bfloat16)
        stage = build(teacher, ENGINE, tp_comm_overlap=True, **layout)
    is_started = base._ub_communicators is not None
    kernels.stop_userbuffers(config)
    return {
        "buffers": [list(one) for one in sorted(set((tuple(shape), dtype) for shape, dtype in made))],
        "ended": is_started and base._ub_communicators is None,
        **{
            name: sorted(
                {
                    f"{getattr(module, 'ub_name', None)}: "
                    + ", ".join(way.removeprefix("ub_") for way in ways if getattr(module, way, False))
                    for module in engine_modules(model)
                }
            )
            for name, model in stage.models.items()
        },
    }


def train(settings: dict[str, Any]) -> dict[str, int]:
    return engine_on_cpu.train(settings)
