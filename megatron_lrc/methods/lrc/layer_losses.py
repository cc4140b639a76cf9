"""LayerLosses: what a stage of two models asks of the losses between the teacher's layers and the student's.

A stage has one object of this kind for its layers. `begin` opens a micro-batch; then both models run, the
teacher first, and hooks that the object has put into them compare the two; `end` closes the micro-batch.
Whoever builds the stage chooses the class (`CloneLosses`, `TinyBertLosses`). `LayerLosses` itself has none.

Notation: s sequence, b micro-batch.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from megatron_lrc.clone.projections import Projections
from megatron_lrc.mcore.gpt_models import GPTModel
from megatron_lrc.mcore.stages import PipelineStage, Trained


class TwoModels(PipelineStage):
    """What layer losses may use of the stage they belong to: beside what any stage has, the teacher and projections.

    When losses are made it has its models, shapes and groups; the sums and the projections come later, and the
    projections are replaced when a student is opened. So losses keep the stage and look there.
    """

    teacher: GPTModel
    projections: Projections


class LayerLosses:
    """No losses between layers."""

    #: Names of the losses: the columns of `LossSums.clone`.
    terms: Sequence[str] = ()
    #: Groups of gradient norms that the parameters of `trained` make, beside those that every stage has.
    gradient_groups: tuple[str, ...] = ()

    def __init__(self, stage: TwoModels):
        self._stage = stage

    def begin(self, token_weight: Tensor) -> None:
        """A micro-batch begins. token_weight: [s, b], 0 for masked tokens."""

    def end(self, student_hidden: Tensor) -> Tensor:
        """Both models have run. Gives the student's output, where backward enters this micro-batch."""
        return student_hidden

    def forget(self) -> None:
        """The micro-batch ends without the student: the teacher alone has run."""

    @property
    def target_names(self) -> Sequence[str]:
        """Projections through which the teacher's outputs are compared."""
        return ()

    def trained(self) -> Iterable[Trained]:
        """Parameters of the losses' own, which are trained with the student."""
        return ()

    def fixed(self) -> Iterable[Trained]:
        """What the losses save beside what is trained, since it cannot be had otherwise."""
        return ()

    #: Whether the constants of the losses have their values.
    is_calibrated = True

    def calibrating(self) -> AbstractContextManager[None]:
        """While it is entered the teacher runs alone, on the tokens that constants of the losses come from."""
        return nullcontext()

    def initialize(self, seed: int) -> None:
        """Give the losses' own parameters their first values."""


#: Makes a stage's losses when its two models are there.
LayerLossesFactory = Callable[[TwoModels], LayerLosses]
