"""What the teacher's layers that a student lacks add to the residual stream, while the teacher runs alone.

A student passes such layers unchanged. So if its other layers gave what the teacher's give, its residual stream would
be the teacher's without what these have added: that is what a closed-form start fits its projections to read.

Notation: s sequence, b micro-batch, D teacher hidden, d student hidden; `/tp` split over tensor parallelism.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron_lrc.config import ModelShape
from megatron_lrc.mcore.gpt_models import GPTModel, layers_of


class SkippedLayers:
    """Of one stage. `added` [s/tp, b, d]: the sum so far in this micro-batch, in a basis; 0.0 where there is none.

    It travels between stages in the place of the student's hidden state.
    """

    def __init__(self, teacher: GPTModel, student: GPTModel, shape: ModelShape):
        """shape: the student's."""
        kept = {shape.teacher_layer(layer) for layer, _ in layers_of(student)}
        self._layers = [module for layer, module in layers_of(teacher) if layer not in kept]
        self.added: Tensor | float = 0.0

    def begin(self, received: Tensor | None) -> None:
        """A micro-batch begins. received: what the stages before have added, [s/tp, b, d]; None on the first one."""
        self.added = 0.0 if received is None else received

    def follow(self, basis: Tensor) -> list[RemovableHandle]:
        """From now on, until these hooks are removed, add up. basis: Q [D, d]."""
        return [layer.register_forward_hook(partial(self._add, basis), with_kwargs=True) for layer in self._layers]

    def _add(self, basis: Tensor, layer: torch.nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        before, after = args[0] if args else kwargs["hidden_states"], output[0]  # [s/tp, b, D]
        dtype = torch.promote_types(after.dtype, torch.float32)
        self.added = self.added + (after.to(dtype) - before.to(dtype)) @ basis.to(dtype)
