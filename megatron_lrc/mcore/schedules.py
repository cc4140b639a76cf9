"""megatron-core's pipeline schedules over PairedModels: all micro-batches forward and backward, losses as sums."""

import itertools
from collections.abc import Callable, Iterator

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_lrc.config import Config
from megatron_lrc.mcore.paired_model import PairedModel

Batch = dict[str, Tensor]
ForwardStep = Callable[[PairedModel, Batch], Tensor]


def forward_backward(
    stages: list[PairedModel],
    batches: Iterator[Batch],
    config: Config,
    *,
    num_microbatches: int,
    forward_only: bool = False,
    forward_step: ForwardStep = PairedModel.__call__,
) -> None:
    """Run the schedule. Leaves dW_S, the gains' and the clone targets' gradients, and each stage's loss sums behind.

    Every stage reads every micro-batch: the loss mask is needed wherever a clone loss is. megatron-core finalises no
    gradients here (`finalize_model_grads_func` is unset), because pull back comes between backward and reduction.
    """

    def step(iterator: Iterator[Batch], stage: PairedModel) -> tuple[Tensor, Callable]:
        batch = next(iterator)
        num_tokens = batch["loss_mask"].sum().int()
        return forward_step(stage, batch), lambda loss: (loss, num_tokens, {})

    get_forward_backward_func()(
        forward_step_func=step,
        # Each chunk reads every micro-batch for itself.
        data_iterator=batches if len(stages) == 1 else list(itertools.tee(batches, len(stages))),
        model=stages,
        num_microbatches=num_microbatches,
        seq_length=config.training.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=forward_only,
    )


@torch.no_grad()
def forward_teacher(
    stages: list[PairedModel], batches: Iterator[Batch], config: Config, *, num_microbatches: int
) -> None:
    """Run only the teacher over some micro-batches (calibration: whoever needs its activations has hooks in place)."""
    forward_backward(
        stages,
        batches,
        config,
        num_microbatches=num_microbatches,
        forward_only=True,
        forward_step=PairedModel.forward_teacher,
    )
