"""Effective rank of both models' hidden states, layer by layer: in how many directions the residual stream spreads.

The measure is `clone.spectrum.effective_rank`, of X [tokens, hidden]. Each token is scaled to unit RMS first, as the
norm in front of a layer sees it; the massive activations of a sequence's first tokens would otherwise be all there is.
Masked tokens count too.

The singular values come from the eigenvalues of X^T X, which is a sum over ranks. It is gathered in fp64, since its
rounding error meets them under a square root: one [hidden, hidden] matrix for each model and each layer of this rank
while a validation runs (2.2 GB for 28 layers of 3072).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from megatron_lrc.clone.initialization import SecondMoment
from megatron_lrc.clone.spectrum import effective_rank
from megatron_lrc.mcore.distributed import Groups, reduce_over_stage, sum_over_world
from megatron_lrc.mcore.gpt_models import layer_input_norms
from megatron_lrc.mcore.stages import PipelineStage

T = TypeVar("T")


def measure_effective_rank(
    forward: Callable[[], T], stages: Sequence[PipelineStage], groups: Groups
) -> tuple[T, dict[str, list[float]]]:
    """What `forward` returns, and "teacher" (if there is one) and "student" -> effective rank of what it has
    put through the stages. n + 1 values for n layers: at each layer's input, and at the final norm's;
    not-a-number where a hidden state was not finite. Collective; the same on every rank."""
    moments: dict[tuple[int, int], SecondMoment] = {}  # (model, layer)
    hooks = []
    for stage in stages:
        for column, model in enumerate(stage.models.values()):
            for layer, norm in layer_input_norms(model):
                moment = moments[column, layer] = SecondMoment(model.config.hidden_size, groups.device)
                hooks.append(norm.register_forward_pre_hook(partial(_add_input, moment)))
    try:
        result = forward()
    finally:
        for hook in hooks:
            hook.remove()
    counts = {name: model.config.num_layers + 1 for name, model in stages[0].models.items()}
    ranks = torch.zeros(len(counts), max(counts.values()), dtype=torch.float64, device=groups.device)
    for place, total in _complete(moments):
        ranks[place] = effective_rank(total)
    rows = zip(counts.items(), sum_over_world(ranks).tolist(), strict=True)
    return result, {name: row[:count] for (name, count), row in rows}


def _add_input(moment: SecondMoment, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    moment.add(inputs[0].double())


def _complete(moments: dict[tuple[int, int], SecondMoment]) -> list[tuple[tuple[int, int], Tensor]]:
    """The sums over the ranks of this stage, each on one of them, in turn, so that the eigenvalues are shared out."""
    own = []
    for index, place in enumerate(list(moments)):
        total = moments.pop(place).total
        if reduce_over_stage(total, index):
            own.append((place, total))
    return own
