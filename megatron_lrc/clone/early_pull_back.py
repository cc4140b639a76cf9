"""Pulls back each weight's gradient as soon as the last backward pass of a step has completed it.

With --overlap-grad-reduce the data-parallel sum of a P then runs beside the rest of that pass, and not only
beside the pull back of the layers before it. With few micro-batches a step (the published runs have three)
that is a third of backward.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class EarlyPullBack:
    """A P's gradient has two sources: the student's weight, and where the clone loss projects the teacher's
    output with the same P, that target. It is pulled back when backward has left both.

    weights, with_target, pull_back: as of `Overlap.watch_weights`.
    is_last: whether the backward pass in progress is the step's last one of this stage.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        with_target: Collection[str],
        pull_back: Callable[[str], None],
        is_last: Callable[[], bool],
    ):
        self._pull_back, self._is_last = pull_back, is_last
        both, one = {"weight", "target"}, {"weight"}
        self._sources = {name: both if name in with_target else one for name in weights}
        self._missing: dict[str, set[str]] = {}
        self.begin_step()
        names_of: dict[nn.Parameter, list[str]] = {}  # fused parameters have several
        for name, parameter in weights.items():
            names_of.setdefault(parameter, []).append(name)
        for parameter, names in names_of.items():
            # Hooks run in order of registration: that of `accumulate_in_fp32` has gathered the gradient by now.
            parameter.register_post_accumulate_grad_hook(self._hook(names, "weight"))

    def begin_step(self) -> None:
        self._missing = {name: set(sources) for name, sources in self._sources.items()}

    def watch_target(self, name: str, leaf: Tensor) -> None:
        if name in self._sources:
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
                    self._pull_back(name)

        return gradient_has_come

    def is_done(self, name: str) -> bool:
        """Whether this P's gradient has been pulled back in this step."""
        return not self._missing.get(name, {"weight"})
