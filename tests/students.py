"""Students that have been trained a little, for the tests of exports."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_lrc.clone.sites import projection_names
from megatron_lrc.hf.export import export_model
from megatron_lrc.hf.families import TeacherDescription
from megatron_lrc.hf.student_weights import StudentWeights

TOKENS = torch.arange(3, 51).view(2, 24) * 5 % 301

State = tuple[dict[str, Tensor], dict[str, Tensor]]


def random_student(description: TeacherDescription, hidden: int, *, has_lm_head: bool, dtype=torch.float32) -> State:
    """Projections and norm gains of a student that has been trained a little."""
    generator = torch.Generator().manual_seed(11)
    layers = range(description.shape.num_layers)
    size = (description.shape.hidden_size, hidden)
    names = projection_names(layers, True, has_lm_head)
    projections = {name: (torch.randn(size, generator=generator) * 0.2).to(dtype) for name in names}
    gains = [f"layers.{layer}.{norm}" for layer in layers for norm in description.shape.norms] + ["final"]
    norms = {name: (1 + 0.1 * torch.randn(hidden, generator=generator)).to(dtype) for name in gains}
    return projections, norms


def export_student(
    *,
    teacher: TeacherDescription,
    projections: dict[str, Tensor],
    norms: dict[str, Tensor],
    student_hidden_size: int,
    output: Path,
    dtype: torch.dtype | None = None,
    save_projections: bool = False,
    **how: Any,
) -> None:
    """Write the student that these make of this teacher, by `export_model`. dtype: default the projections' own."""
    shape = replace(teacher.shape, hidden_size=student_hidden_size, is_tied="lm_head" not in projections)
    weights = StudentWeights(teacher, shape, projections=projections, norms=norms)
    if save_projections:
        how["write_extra"] = weights.write_projections
    dtype = dtype or projections["embed"].dtype
    export_model(base=teacher, shape=shape, weight_of=weights, dtype=dtype, output=output, **how)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits
