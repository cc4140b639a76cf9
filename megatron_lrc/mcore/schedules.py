"""megatron-core's pipeline schedules over the stages: all micro-batches forward and backward."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lrc.config import Config
from megatron_lrc.mcore.messages import own_messages
from megatron_lrc.mcore.stages import PipelineStage

Batch = dict[str, Tensor]
ForwardStep = Callable[[Any, Batch], Tensor]  # of a stage


def forward_backward(
    stages: Sequence[PipelineStage],
    batches: Iterator[Batch],
    config: Config,
    *,
    num_microbatches: int,
    forward_only: bool = False,
    forward_step: ForwardStep = nn.Module.__call__,
) -> None:
    """Run the schedule. Leaves gradients (of W_S, gains, clone targets) and each stage's loss sums behind.

    Every stage reads every micro-batch: the loss mask is needed wherever a clone loss is. megatron-core
    finalises no gradients here (`finalize_model_grads_func` is unset), because pull back comes between
    backward and reduction.
    """

    def step(iterator: Iterator[Batch], stage: PipelineStage) -> tuple[Tensor, Callable]:
        batch = own_part_of_sequence(next(iterator), stage.groups.cp)
        num_tokens = batch["loss_mask"].sum().int()
        return forward_step(stage, batch), lambda loss: (loss, num_tokens, {})

    get_forward_backward_func()(
        forward_step_func=step,
        # Each chunk reads every micro-batch for itself.
        data_iterator=batches if len(stages) == 1 else list(itertools.tee(batches, len(stages))),
        model=list(stages),
        num_microbatches=num_microbatches,
        seq_length=config.training.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=forward_only,
        **own_messages(stages[0].config, stages[0].groups.pp, stages[0].frozen_width),
    )


def own_part_of_sequence(batch: Batch, group: ProcessGroup) -> Batch:
    """Of each [b, s] tensor the tokens of this context parallel rank, [b, s/cp]; `documents` stay whole.

    The sequence falls into 2 cp pieces, and rank r takes pieces r and 2 cp - 1 - r: as megatron-core cuts its rotary
    embeddings. A late piece attends to much and an early one to little, so that every rank has the same work.
    """
    size, rank = group.size(), group.rank()
    if size == 1:
        return batch

    def own(whole: Tensor) -> Tensor:
        pieces = whole.chunk(2 * size, dim=1)
        return torch.cat([pieces[rank], pieces[-1 - rank]], dim=1)

    return {name: whole if name == "documents" else own(whole) for name, whole in batch.items()}
