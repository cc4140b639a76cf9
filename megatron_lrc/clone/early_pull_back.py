"""Pulls back each weight's gradient as soon as the last backward pass of a step has completed it.

With --overlap-grad-reduce the data-parallel sum of a P then runs beside the rest of that pass, not only beside the pull
back of the layers before it: with few micro-batches a step (the published runs have three) that is a third of backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lrc.clone.projections import ClonedWeight, Projections


class EarlyPullBack:
    """A P's gradient has two sources: the student's weight, and where the clone loss projects the teacher's output with
    the same P, that target. It is pulled back when backward has left both.

    is_last: whether the backward pass in progress is the step's last one of this stage.
    when_complete: as of `Projections.pull_back`.
    """

    def __init__(
        self,
        projections: Projections,
        weights: Sequence[ClonedWeight],
        is_last: Callable[[], bool],
        when_complete: Callable[[nn.Parameter], None],
    ):
        self._projections, self._is_last, self._when_complete = projections, is_last, when_complete
        self._weights = {weight.projection: weight for weight in weights if not weight.is_own}
        self._missing: dict[str, set[str]] = {}
        self.begin_step()
        of_parameter: dict[nn.Parameter, list[str]] = {}  # fused parameters have several
        for name, weight in self._weights.items():
            of_parameter.setdefault(weight.student, []).append(name)
        for parameter, names in of_parameter.items():
            parameter.register_post_accumulate_grad_hook(self._hook(names, "weight"))  # behind `accumulate_in_fp32`'s
        projections.when_target_is_made = self._watch_target

    def begin_step(self) -> None:
        """No gradient has come yet."""
        trained_targets = self._projections.trained_targets
        self._missing = {
            name: {"weight", "target"} if name in trained_targets else {"weight"} for name in self._weights
        }

    def _watch_target(self, name: str, leaf: Tensor) -> None:
        if name in self._weights:
            leaf.register_post_accumulate_grad_hook(self._hook([name], "target"))

    def _hook(self, names: list[str], source: str) -> Callable[[Any], None]:
        @torch.no_grad()
        def gradient_has_come(_: Tensor) -> None:
            if not self._is_last():
                return
            for name in names:
                missing = self._missing[name]
                if not missing:
                    raise RuntimeError(f"a gradient of {name} came after it had been pulled back")
                missing.discard(source)
                if not missing:
                    self._projections.pull_back_one(self._weights[name])
                    self._when_complete(self._projections.matrix(name))

        return gradient_has_come

    def is_done(self, name: str) -> bool:
        """Whether this P's gradient has been pulled back in this step."""
        return not self._missing.get(name, {"weight"})
