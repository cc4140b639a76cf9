"""Micro-batches: which samples each data-parallel rank takes, and in which order.

A step of a run that has read `consumed` samples uses the next global_batch_size ones, for any layout:

    sample of (micro-batch m of the step, data-parallel rank r, position j)
        = consumed + (m * dp_size + r) * micro_batch_size + j

so that a run continued on other processes sees the same global batches, with other batch sizes the same
samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class BatchIterator:
    """The micro-batches of one data-parallel rank, in order, from global sample `consumed_samples` on.

    Each is a dict of tensors [micro_batch_size, seq_length] on `device`: tokens, labels, position_ids
    (int64), loss_mask (fp32). Stops where no full global batch is left in the dataset, on every rank alike.
    `consumed_samples` counts the samples of all ranks.

    num_workers: processes that read; None: `default_workers`.
    finds_documents: whether each also has `find_documents`' `documents`, which stay on the CPU.
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
        num_workers: int | None,
        finds_documents: bool = False,
    ):
        self._samples_per_micro_batch = micro_batch_size * dp_size
        assert global_batch_size % self._samples_per_micro_batch == 0
        self.consumed_samples = consumed_samples
        self._device = device
        num_workers = default_workers(device) if num_workers is None else num_workers
        left = max(len(dataset) - consumed_samples, 0)  # type: ignore[arg-type]
        end = consumed_samples + left // global_batch_size * global_batch_size
        starts = range(consumed_samples + dp_rank * micro_batch_size, end, self._samples_per_micro_batch)
        loader = DataLoader(
            dataset,
            batch_sampler=_MicroBatches(starts, micro_batch_size),
            num_workers=num_workers,
            # Forked, whatever Python's default: `train/stopping.py` relies on it.
            multiprocessing_context="fork" if num_workers else None,
            collate_fn=partial(_collate, finds_documents=finds_documents),
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the default one is the training's: drawing from it would change the run
        )
        self._batches = iter(loader)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = next(self._batches)
        self.consumed_samples += self._samples_per_micro_batch
        documents = {key: batch.pop(key) for key in ("documents",) if key in batch}
        return documents | {key: tensor.to(self._device, non_blocking=True) for key, tensor in batch.items()}


def default_workers(device: torch.device) -> int:
    """Processes that read data: on a GPU, which waits while its process reads, Megatron-LM's number; on a CPU they
    would only take the cores that compute."""
    return 2 if device.type == "cuda" else 0


def find_documents(position_ids: torch.Tensor) -> torch.Tensor:
    """[documents, 3], int64: (row, first token, end) of each document in a batch, in order. position_ids: [b, s], of
    the whole sequence, 0 at the first token of each document and only there. Attention on the host has to know where
    they are, so this is for a batch that is not on the device yet: on one it would wait for all that is enqueued."""
    starts = (position_ids == 0).nonzero()
    first, length = starts[:, 1], position_ids.shape[1]
    end = first.roll(-1).where(first.roll(-1) > 0, length)  # the next document's start, or the row's end
    return torch.column_stack([starts, end])


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


def _collate(samples: list[dict[str, torch.Tensor]], *, finds_documents: bool) -> dict[str, torch.Tensor]:
    batch = default_collate([{key: sample[key] for key in _BATCH_KEYS} for sample in samples])
    return {**batch, "documents": find_documents(batch["position_ids"])} if finds_documents else batch
