"""Layers with sliding windows that are rotated otherwise than the others, as in Gemma 3 and OLMo 3.

A Qwen2 with windows stands for such a family. In the reference its layers are given what OLMo 3's own module in
transformers computes for layers of their type: YaRN with its factor of cos and sin in full layers, and in those with
windows another base alone.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Olmo3Config
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

import gradient_cases
from damage import change_config
from gradient_cases import Layout, Sizes, Variant, compare_with_the_reference
from hf_teachers import YARN_ROPE, write_qwen2_with_windows
from reference import Reference

BASE = 37.0  # of layers with windows
BY_LAYER = {
    "full_attention": {name: value for name, value in YARN_ROPE.items() if name != "truncate"},
    "sliding_attention": {"rope_type": "default", "rope_theta": BASE},
}
LAYER_TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
SUFFIX = "-by-layer"  # of the folder that our models read; the reference reads the same one without it


class OfKinds(nn.Module):
    """type of layer -> (cos, sin), by OLMo 3's module."""

    def __init__(self, rotary: Olmo3RotaryEmbedding):
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden: Tensor, position_ids: Tensor) -> dict[str, tuple[Tensor, ...]]:
        return {
            kind: tuple(part.to(hidden.dtype) for part in self.rotary(hidden, position_ids, kind)) for kind in BY_LAYER
        }


class ReferenceByLayer(Reference):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for model in (self.teacher, self.student):
            config = Olmo3Config(
                head_dim=16,
                layer_types=model.config.layer_types,
                num_hidden_layers=len(model.model.layers),
                rope_parameters={kind: dict(settings) for kind, settings in BY_LAYER.items()},
            )
            model.model.rotary_emb = OfKinds(Olmo3RotaryEmbedding(config))
            for layer, kind in zip(model.model.layers, model.config.layer_types, strict=True):
                layer.register_forward_pre_hook(
                    lambda layer, args, kwargs, kind=kind: (
                        args,
                        kwargs | {"position_embeddings": kwargs["position_embeddings"][kind]},
                    ),
                    with_kwargs=True,
                )


def gradients_by_layer(config, sizes):
    """On a rank: `clone_gradients` of a family that declares RoPE by layer."""
    from dataclasses import replace

    from megatron_lrc.hf import teacher_checks
    from megatron_lrc.hf.architectures import QWEN2

    teacher_checks.FAMILIES = (replace(QWEN2, rope_by_layer=True),)
    config.model.teacher += SUFFIX
    return CLONE_GRADIENTS(config, sizes)


CLONE_GRADIENTS = gradient_cases.clone_gradients


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, pp=2),
        pytest.param(Layout(micro=12), marks=pytest.mark.slow),
        pytest.param(Layout(pp=2, recompute="core_attn"), marks=pytest.mark.slow),
        pytest.param(Layout(pp=2, chunks=2, recompute="full"), marks=pytest.mark.slow),
        pytest.param(Layout(cp=2), marks=pytest.mark.slow),
        pytest.param(Layout(cp=2, recompute="full"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rope_by_layer_equals_the_reference(tmp_path: Path, monkeypatch, layout: Layout) -> None:
    """A student with fewer layers has in each what the teacher's layer has; in one case documents are packed, and
    positions begin anew in each."""
    for suffix in ("", SUFFIX):
        write_qwen2_with_windows(Path(f"{tmp_path}{suffix}"), num_layers=4, dtype=torch.float64)
    change_config(Path(f"{tmp_path}{SUFFIX}"), rope_parameters=BY_LAYER, layer_types=LAYER_TYPES)
    change_config(tmp_path, layer_types=LAYER_TYPES)
    monkeypatch.setattr(gradient_cases, "Reference", ReferenceByLayer)
    monkeypatch.setattr(gradient_cases, "clone_gradients", gradients_by_layer)
    is_packed = layout.cp > 1 and layout.recompute == "full"
    kept = (0, 2, 3) if layout.chunks == 1 and layout.world < 4 else None
    variant = Variant(kept=kept, reset_attention=is_packed, reset_positions=is_packed)
    sizes = Sizes(vocab=10, eod=3) if is_packed else Sizes()
    compare_with_the_reference(str(tmp_path), layout, variant, tied=False, sizes=sizes)
