"""The overlap of a stage whose trained parameters lie in the buckets of megatron-core's DDP.

DDP finds out by hooks when a module reads a parameter in its forward pass, and when autograd has completed a
gradient. It cannot see either of a P, which is read outside of any forward pass, and whose gradient is made
by pull back. Here the stage tells it.
"""

from collections.abc import Callable, Collection, Mapping

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from megatron_lrc.clone.early_pull_back import EarlyPullBack
from megatron_lrc.clone.overlap import Overlap


class BucketOverlap(Overlap):
    """replica: DDP round the stage's trained module; in its configuration is what overlaps.

    has_pipeline: whether other ranks have other stages.
    """

    def __init__(self, replica: DistributedDataParallel, *, has_pipeline: bool):
        self._replica = replica
        self._are_sums_overlapped = replica.ddp_config.overlap_grad_reduce
        self._are_gathers_overlapped = replica.ddp_config.overlap_param_gather
        # Gathers then run beside the teacher's first pass. Where a pipeline fills, compose fills the wait.
        self.composes_behind_teacher = self._are_gathers_overlapped and not has_pipeline
        self._early: EarlyPullBack | None = None

    def parameter_is_needed(self, parameter: nn.Parameter) -> None:
        group = self._replica.param_to_bucket_group.get(parameter)  # what is not trained any more is in none
        if self._are_gathers_overlapped and group is not None:
            group.finish_param_sync(skip_next_bucket_dispatch=True)

    def gradient_is_complete(self, parameter: nn.Parameter) -> None:
        if self._are_sums_overlapped:  # a bucket is summed when its last gradient is
            self._replica.param_to_bucket_group[parameter].register_grad_ready(parameter)

    def watch_weights(
        self,
        weights: Mapping[str, nn.Parameter],
        with_target: Collection[str],
        pull_back: Callable[[str], None],
    ) -> None:
        if self._are_sums_overlapped:
            self._early = EarlyPullBack(weights, with_target, pull_back, self._is_last_backward)

    def watch_target(self, name: str, leaf: Tensor) -> None:
        if self._early:
            self._early.watch_target(name, leaf)

    def is_pulled_back(self, name: str) -> bool:
        return self._early is not None and self._early.is_done(name)

    def begin_step(self) -> None:
        if self._early:
            self._early.begin_step()

    def _is_last_backward(self) -> bool:
        """The schedule holds DDP's `no_sync` open until this stage's last backward pass of a step."""
        return self._replica.bucket_groups[0].is_last_microbatch
