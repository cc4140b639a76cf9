"""What happens when a loss or a gradient is not finite: the step is skipped and said where it began; enough in a row
stop the run.

A fault spreads: forward to later layers, backward to earlier ones, and by every reduction to other ranks. So each rank
looks at what it has before any reduction, in the order in which things are computed, and the earliest find of all
ranks is the one named. Looking costs nothing while all is well: it happens only after a step has been skipped.
"""

from collections.abc import Iterator

import torch.distributed as dist

from megatron_lrc.clone.projections import ClonedWeight, gradient_of
from megatron_lrc.clone.sites import LAYER_SITES
from megatron_lrc.mcore.paired_model import PairedModel


def find_fault(stages: list[PairedModel]) -> str:
    """Where the step's first value that is not finite is, over all ranks. Collective; the same text on every rank."""
    mine = [(*fault, dist.get_rank()) for stage in stages for fault in _faults(stage)]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, min(mine, default=None))
    found = sorted(fault for fault in gathered if fault is not None)
    if not found:
        return "the gradient norm is not finite, though the gradients of the student's matrices are"
    order, what, _ = found[0]
    ranks = [str(rank) for other_order, _, rank in found if other_order == order]
    return f"{what} is not finite on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}"


def _faults(stage: PairedModel) -> Iterator[tuple[tuple[int, int, int], str]]:
    """(place in the order of computation, description) of what is not finite on this rank: losses, then gradients."""
    for layer, index in (~stage.sums.clone.isfinite()).nonzero().tolist():
        yield (0, layer, index), f"the clone loss of layer {layer}, term {LAYER_SITES[index].name},"
    for index, name in enumerate(("LM", "KL")):
        if not stage.sums.main[index].isfinite():
            yield (1, 0, index), f"the {name} loss"
    for weight in stage.cloned_weights:
        grad = gradient_of(weight.student)
        if grad is not None and not bool(grad.isfinite().all()):
            yield _place_of_gradient(weight)


def _place_of_gradient(weight: ClonedWeight) -> tuple[tuple[int, int, int], str]:
    """Backward begins at the LM head, goes down the layers, and ends at the embedding."""
    if weight.site not in LAYER_SITES:
        first_or_last = -(1 << 30) if weight.site.name == "lm_head" else 1
        return (2, first_or_last, 0), f"the gradient of {weight.site.name}"
    layer = int(weight.projection.split(".")[1])
    return (2, -layer, -LAYER_SITES.index(weight.site)), f"the gradient of layer {layer}, term {weight.site.name},"
