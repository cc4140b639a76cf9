"""What happens when a loss or a gradient is not finite, or a gradient norm jumps: the step is skipped and the reason
said; enough in a row stop the run.

A fault spreads: forward to later layers, backward to earlier ones, and by every reduction to other ranks. So each rank
looks at what it has before any reduction (but for gradients that the optimizer reduces in place, those of a model that
is trained by itself), in the order in which things are computed, and the earliest find of all ranks is the one named.
Looking costs nothing while all is well: it happens only after a step has been skipped.
"""

import math
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from megatron_lrc.checkpoints.run_directory import RunState
from megatron_lrc.clone.sites import LAYER_SITES, Site
from megatron_lrc.config import Config
from megatron_lrc.mcore.stages import PipelineStage
from megatron_lrc.train.step import StepReport

#: Steps over which the gradient norm's running mean is taken, and how many it needs before it says anything.
MEAN_OVER, MEAN_NEEDS = 100, 20


class Guard:
    """Counts skipped steps, and keeps the running mean of the gradient norm in `state`, where it survives a restart.

    A step above --spike-factor times that mean is skipped before it can do harm: after it, Adam's second moment would
    keep the rate down for a thousand steps. Overflows while fp16's loss scale is sought are not counted.
    """

    def __init__(self, config: Config, state: RunState, stages: Sequence[PipelineStage]):
        self._config, self._state, self._stages = config, state, stages
        self._in_a_row, self._reason = 0, ""

    @property
    def largest_norm(self) -> float:
        """The gradient norm above which the next step is to be skipped."""
        factor = self._config.training.spike_factor
        if factor is None or self._state.grad_norm_count < MEAN_NEEDS:
            return math.inf
        return factor * self._state.grad_norm_mean

    @property
    def is_over(self) -> bool:
        return self._in_a_row >= self._config.training.max_skipped_steps

    @property
    def last_words(self) -> str:
        return (
            f"stopped at step {self._state.step} after {self._in_a_row} skipped steps in a row (--max-skipped-steps): "
            f"{self._reason}. The weights are those of the last step that was taken. Lower --lr or --alpha, or "
            "look at the data of these steps, and continue with --load."
        )

    def look_at(self, report: StepReport) -> str | None:
        """Take note of a step; what to say about it if it was skipped. Collective where a fault has to be found."""
        step = self._state.step
        if report.is_updated:
            self._in_a_row = 0
            self._state.grad_norm_count += 1
            weight = 1 / min(self._state.grad_norm_count, MEAN_OVER)
            self._state.grad_norm_mean += weight * (report.grad_norm - self._state.grad_norm_mean)
            return None
        if report.skipped_for == "overflow":
            return f"step {step} skipped: gradients overflow at loss scale {report.loss_scale:g}; a lower one is sought"
        if report.skipped_for == "spike":
            factor = self._config.training.spike_factor
            self._reason = (
                f"the gradient norm {report.grad_norm:.3g} is above --spike-factor {factor} times "
                f"its running mean {self._state.grad_norm_mean:.3g}"
            )
        else:
            self._reason = find_fault(self._stages)
        self._in_a_row += 1
        limit = self._config.training.max_skipped_steps
        return f"step {step} skipped ({self._in_a_row} in a row, the run stops at {limit}): {self._reason}"


def find_fault(stages: Sequence[PipelineStage]) -> str:
    """Where the step's first value that is not finite is, over all ranks. Collective; the same text on every rank."""
    mine = [(*fault, dist.get_rank()) for stage in stages for fault in _faults(stage)]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, min(mine, default=None))
    found = sorted(fault for fault in gathered if fault is not None)
    if not found:
        return "the gradient norm is not finite, though the gradients of the student's matrices are"
    order, what, _ = found[0]
    ranks = [str(rank) for other_order, _, rank in found if other_order == order]
    shared = ", or on another of its node: --share-compose has summed theirs" if stages[0].groups.sharing else ""
    return f"{what} is not finite on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}{shared}"


def _faults(stage: PipelineStage) -> Iterator[tuple[tuple[int, int, int], str]]:
    """(place in the order of computation, description) of what is not finite on this rank: losses, then gradients."""
    for layer, index in (~stage.sums.clone.isfinite()).nonzero().tolist():
        yield (0, layer, index), f"the clone loss of layer {layer}, term {stage.sums.terms[index]},"
    main = stage.sums.main
    for order, (name, value) in enumerate({"LM": main.lm, "KL": main.kl}.items()):
        if not value.isfinite():
            yield (1, 0, order), f"the {name} loss"
    for site, layer, grad in stage.matrix_gradients():
        if not bool(grad.isfinite().all()):
            yield _place_of_gradient(site, layer)


def _place_of_gradient(site: Site, layer: int | None) -> tuple[tuple[int, int, int], str]:
    """Backward begins at the LM head, goes down the layers, and ends at the embedding."""
    if layer is None:
        first_or_last = -(1 << 30) if site.name == "lm_head" else 1
        return (2, first_or_last, 0), f"the gradient of {site.name}"
    return (2, -layer, -LAYER_SITES.index(site)), f"the gradient of layer {layer}, term {site.name},"
