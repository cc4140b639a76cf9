"""Gradient norms by kind of matrix: which part of the student the step's gradient falls on.

After the reductions a gradient lies on the ranks as follows, and each number must be counted once:

    over TP           matrices in shards; gains replicated
    over DP (and CP)  with the distributed optimizer only a rank's own range of each parameter is complete; without it
                      every rank has everything
    over PP           each layer on its stage; what is tied on both ends, of which the second is a copy (`shared`)
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_lrc.checkpoints.layout import SITES
from megatron_lrc.clone.sites import LM_HEAD, HeadLayout, select
from megatron_lrc.mcore import compat
from megatron_lrc.mcore.distributed import Groups, sum_over_world
from megatron_lrc.mcore.optimizer import StageOptimizer
from megatron_lrc.mcore.stages import PipelineStage, Trained


@torch.no_grad()
def group_gradient_norms(
    optimizer: StageOptimizer, stages: Sequence[PipelineStage], groups: Groups
) -> dict[str, float | None]:
    """Group -> L2 norm of its gradient over all layers and ranks; None for an lm_head that is tied. To be
    called between `reduce_gradients` and `clip_and_step`. Gradients are means over the global batch's tokens,
    the fp16 loss scale taken out. Collective, one small all-reduce; waits for the device."""
    names = stages[0].gradient_groups
    squares = torch.zeros(len(names), dtype=torch.float64, device=groups.device)
    for stage in stages:
        for trained in stage.trained():
            if not trained.is_copy and (trained.split is not None or groups.tp.rank() == 0):
                for group, square in _own_squares(optimizer, trained, stage.heads):
                    squares[names.index(group)] += square
    totals = (sum_over_world(squares).sqrt() / optimizer.loss_scale).tolist()
    norms = dict(zip(names, totals, strict=True))
    return {**norms, LM_HEAD.name: None} if stages[0].shapes.student.is_tied else norms


def _own_squares(optimizer: StageOptimizer, trained: Trained, heads: HeadLayout) -> Iterator[tuple[str, Tensor]]:
    """(group, sum of squares, fp64) of the part of a gradient that no other data parallel rank counts."""
    grad: Tensor = trained.parameter.main_grad  # type: ignore[attr-defined]
    owned = compat.owned_range(optimizer.optimizer, trained.parameter)
    if owned is None:
        return
    if len(trained.groups) == 1:
        yield trained.groups[0], grad.view(-1)[owned].double().square().sum()
        return
    own = torch.zeros_like(grad)
    own.view(-1)[owned] = grad.view(-1)[owned]
    for group in trained.groups:
        yield group, select(SITES[group], own, heads).double().square().sum()
