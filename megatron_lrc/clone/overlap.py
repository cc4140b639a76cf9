"""Overlap: what a stage says of its parameters while it computes, so that communication can run meanwhile.

A stage says "this P is needed" before it reads one, and "this gradient is complete" when it has made one. It also
shows its weights, so that it can be found out when backward has completed a dW_S. What happens then is not the
stage's concern: other ranks' parts of P may have to arrive first, and dP may be made, and sent, there and then.
"""

from collections.abc import Callable, Collection, Mapping

from torch import Tensor, nn


class Overlap:
    """Nothing overlaps: every parameter is whole; gradients are pulled back and summed behind backward."""

    #: Whether the stage composes behind the teacher's first forward pass of a step, instead of before it.
    composes_behind_teacher = False

    def parameter_is_needed(self, parameter: nn.Parameter) -> None:
        """Return when this rank has the whole of a trained parameter, which is about to be read."""

    def gradient_is_complete(self, parameter: nn.Parameter) -> None:
        """The gradient of a trained parameter is complete but for the data-parallel sum, which may begin."""

    def watch_weights(
        self, weights: Mapping[str, nn.Parameter], with_target: Collection[str], pull_back: Callable[[str], None]
    ) -> None:
        """Find out in each step when backward has completed a dW_S, and `pull_back` it then if that is of use.

        weights: name of a projection -> the student's weight that it makes; a fused weight has several.
        with_target: names whose gradient comes through a target, told of by `watch_target`; also, or only.
        """

    def watch_target(self, name: str, leaf: Tensor) -> None:
        """A target of this projection has been made for the step, which gathers a gradient."""

    def is_pulled_back(self, name: str) -> bool:
        """Whether this projection's gradient has been made in this step already."""
        return False

    def begin_step(self) -> None:
        """No gradient has come yet."""
