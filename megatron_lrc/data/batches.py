"""Micro-batches: which samples each data-parallel rank takes, and in which order.

A step of a run that has read `consumed` samples uses the next global_batch_size ones, for any layout:

    sample of (micro-batch m of the step, data-parallel rank r, position j)
        = consumed + (m * dp_size + r) * micro_batch_size + j

so that a run continued on other processes sees the same global batches, with other batch sizes the same
samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class BatchIterator:
    """The micro-batches of one data-parallel rank, in order, from global sample `consumed_samples` on.

    Each is a dict of tensors [micro_batch_size, seq_length] on `device`: tokens, labels, position_ids
    (int64), loss_mask (fp32). Stops where no full global batch is left in the dataset, on every rank alike.
    `consumed_samples` counts the samples of all ranks.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        consumed_samples: int,
        device: torch.device,
        num_workers: int,
    ):
        self._samples_per_micro_batch = micro_batch_size * dp_size
        assert global_batch_size % self._samples_per_micro_batch == 0
        self.consumed_samples = consumed_samples
        self._device = device
        left = max(len(dataset) - consumed_samples, 0)  # type: ignore[arg-type]
        end = consumed_samples + left // global_batch_size * global_batch_size
        starts = range(consumed_samples + dp_rank * micro_batch_size, end, self._samples_per_micro_batch)
        loader = DataLoader(
            dataset,
            batch_sampler=_MicroBatches(starts, micro_batch_size),
            num_workers=num_workers,
            # Forked, whatever Python's default: `train/stopping.py` relies on it.
            multiprocessing_context="fork" if num_workers else None,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the default one is the training's: drawing from it would change the run
        )
        self._batches = iter(loader)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = next(self._batches)
        self.consumed_samples += self._samples_per_micro_batch
        return {key: tensor.to(self._device, non_blocking=True) for key, tensor in batch.items()}


@dataclass(frozen=True)
class _MicroBatches:
    """Batch sampler: the sample indices of each micro-batch, computed rather than stored."""

    starts: range
    micro_batch_size: int

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, start + self.micro_batch_size))

    def __len__(self) -> int:
        return len(self.starts)


def _collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return default_collate([{key: sample[key] for key in _BATCH_KEYS} for sample in samples])
