"""Gradient norms by kind of matrix: which part of the student the step's gradient falls on.

After the reductions a gradient lies on the ranks as follows, and each number must be counted once:

    over TP           P in shards of rows; gains replicated
    over DP (and CP)  with the distributed optimizer only a rank's own range of each parameter is complete; without it
                      every rank has everything
    over PP           each layer on its stage; a tied P on both ends, of which the second is a copy (`shared`)
"""

import torch
from torch import Tensor, nn

from megatron_lrc.clone.sites import EMBED, LAYER_SITES, LM_HEAD
from megatron_lrc.mcore import compat
from megatron_lrc.mcore.distributed import Groups, sum_over_world
from megatron_lrc.mcore.optimizer import ProjectionOptimizer
from megatron_lrc.mcore.paired_model import PairedModel

NORMS = "norms"

#: What norms are given of: the P of each kind of matrix over all layers (a tied P counts as embed), and all norm gains.
GRADIENT_GROUPS: tuple[str, ...] = (*(site.name for site in LAYER_SITES), EMBED.name, LM_HEAD.name, NORMS)


@torch.no_grad()
def group_gradient_norms(
    optimizer: ProjectionOptimizer, stages: list[PairedModel], groups: Groups
) -> dict[str, float | None]:
    """Group -> L2 norm of its gradient over all layers and ranks; None for an lm_head that has no P of its own.

    To be called between `reduce_gradients` and `clip_and_step`. Gradients are means over the global batch's tokens, the
    fp16 loss scale taken out. Collective, one small all-reduce; waits for the device.
    """
    squares = torch.zeros(len(GRADIENT_GROUPS), dtype=torch.float64, device=groups.device)
    for stage in stages:
        for name, matrix in stage.projections.named_matrices():
            if not getattr(matrix, "shared", False):
                squares[GRADIENT_GROUPS.index(name.rpartition(".")[2])] += _own_square(optimizer, matrix)
        if groups.tp.rank() == 0:
            for _, gain in stage.projections.named_norms():
                squares[GRADIENT_GROUPS.index(NORMS)] += _own_square(optimizer, gain)
    totals = (sum_over_world(squares).sqrt() / optimizer.loss_scale).tolist()
    norms = dict(zip(GRADIENT_GROUPS, totals, strict=True))
    return {**norms, LM_HEAD.name: None} if stages[0].shapes.student.is_tied else norms


def _own_square(optimizer: ProjectionOptimizer, parameter: nn.Parameter) -> Tensor | float:
    """Sum of squares, fp64, of the part of a gradient that no other data parallel rank counts."""
    grad = compat.owned_gradient(optimizer.optimizer, parameter)
    return 0.0 if grad is None else grad.double().square().sum()
