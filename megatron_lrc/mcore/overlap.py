"""The overlap of a stage whose trained parameters lie in the buckets of megatron-core's DDP.

DDP finds out by hooks when a module reads a parameter in its forward pass, and when autograd has completed a gradient.
It cannot see either of a P, which is read outside of any forward pass, and whose gradient is made by pull back. Here
the stage tells it.

With --overlap-grad-reduce each P is pulled back as soon as the last backward pass of a step has completed its gradient.
Its data-parallel sum then runs beside the rest of that pass, and not only beside the pull back of the layers before it.
With few micro-batches a step (the published runs have three) that is a third of backward.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from megatron_lrc.clone.overlap import Overlap


class BucketOverlap(Overlap):
    """replica: DDP round the stage's trained module; in its configuration is what overlaps.

    has_pipeline: whether other ranks have other stages.

    A P's gradient has two sources: the student's weight, and where the clone loss projects the teacher's output with
    the same P, that target. It is pulled back when backward has left both.
    """

    def __init__(self, replica: DistributedDataParallel, *, has_pipeline: bool):
        self._replica = replica
        self._are_sums_overlapped = replica.ddp_config.overlap_grad_reduce
        self._are_gathers_overlapped = replica.ddp_config.overlap_param_gather
        # Gathers then run beside the teacher's first pass. Where a pipeline fills, compose fills the wait.
        self.composes_behind_teacher = self._are_gathers_overlapped and not has_pipeline
        self._sources: dict[str, set[str]] = {}  # of the gradient of each P that is pulled back early
        self._missing: dict[str, set[str]] = {}  # those that backward has not left in this step

    def parameter_is_needed(self, parameter: nn.Parameter) -> None:
        group = self._replica.param_to_bucket_group.get(parameter)  # what is not trained any more is in none
        if self._are_gathers_overlapped and group is not None:
            group.finish_param_sync(skip_next_bucket_dispatch=True)

    def gradient_is_complete(self, parameter: nn.Parameter) -> None:
        if self._are_sums_overlapped:  # a bucket is summed when its last gradient is
            self._replica.param_to_bucket_group[parameter].register_grad_ready(parameter)

    def watch_weights(
        self, weights: Mapping[str, nn.Parameter], with_target: Collection[str], pull_back: Callable[[str], None]
    ) -> None:
        if not self._are_sums_overlapped:
            return
        self._pull_back = pull_back
        self._sources = {name: {"weight"} for name in weights}
        for name in with_target:
            self._sources.setdefault(name, set()).add("target")
        self.begin_step()
        names_of: dict[nn.Parameter, list[str]] = {}  # fused parameters have several
        for name, parameter in weights.items():
            names_of.setdefault(parameter, []).append(name)
        for parameter, names in names_of.items():
            # Hooks run in order of registration: that of `accumulate_in_fp32` has gathered the gradient by now.
            parameter.register_post_accumulate_grad_hook(self._hook(names, "weight"))

    def watch_target(self, name: str, leaf: Tensor) -> None:
        if name in self._sources:
            leaf.register_post_accumulate_grad_hook(self._hook([name], "target"))

    def is_pulled_back(self, name: str) -> bool:
        return not self._missing.get(name, {"weight"})

    def begin_step(self) -> None:
        self._missing = {name: set(sources) for name, sources in self._sources.items()}

    def _hook(self, names: list[str], source: str) -> Callable[[Any], None]:
        @torch.no_grad()
        def gradient_has_come(_: Tensor) -> None:
            # The schedule holds DDP's `no_sync` open until this stage's last backward pass of a step.
            if not self._replica.bucket_groups[0].is_last_microbatch:
                return
            for name in names:
                missing = self._missing[name]
                if not missing:
                    raise RuntimeError(f"a gradient of {name} came after it had been pulled back")
                missing.discard(source)
                if not missing:
                    self._pull_back(name)

        return gradient_has_come
