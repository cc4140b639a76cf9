"""The state of --fp8-recipe delayed: each linear layer's scales, and the maxima of past tensors that they follow from.

The other recipes have none. Transformer Engine keeps it in its modules and would save it pickled; here it is tensors
under names of their own. Maxima are taken over all ranks of a pipeline stage as they are used, so that every rank has
the same.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor

from megatron_lrc.clone.sites import CAPTURED_LINEARS
from megatron_lrc.mcore.gpt_models import layers_of
from megatron_lrc.mcore.stages import PipelineStage


@torch.no_grad()  # leaving the context with gradients on would count as the end of a forward pass
def scaling_state(stages: Sequence[PipelineStage]) -> dict[str, Tensor]:
    """Checkpoint key -> tensor, float32: of the student's layers `scale` [n] and `amax_history` [length, n], forward
    (n = 3 tensors a product: input, weight, output) and backward (n = 2). Empty with other recipes."""
    state: dict[str, Tensor] = {}
    for stage in stages:
        config = stage.student.config
        if config.fp8 is None or config.fp8_recipe != "delayed":
            continue
        for index, layer in layers_of(stage.student):
            for linear in CAPTURED_LINEARS:
                module: Any = layer.get_submodule(linear)
                if not module.fp8_meta_tensors_initialized:  # no pass has been made yet
                    with get_fp8_context(config):
                        module.init_fp8_metadata(num_gemms=1)
                for direction, name in itertools.product(("scaling_fwd", "scaling_bwd"), ("scale", "amax_history")):
                    tensor = getattr(module.fp8_meta[direction], name)
                    state[f"fp8.layers.{index}.{linear}.{direction}.{name}"] = tensor
    return state


@contextlib.contextmanager
def kept_scaling_state(stages: Sequence[PipelineStage]) -> Iterator[None]:
    """An evaluation leaves no trace: passes without gradients note maxima too, each rank its own."""
    before = [(tensor, tensor.clone()) for tensor in scaling_state(stages).values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
