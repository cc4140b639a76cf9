"""One dataset passed over several times: megatron-core's GPTDataset with maps made by `sample_order.py`.

In a file of its own because it imports megatron-core, which `datasets.py` does only where datasets are built.
"""

from collections.abc import Iterator
from typing import Any

import numpy
import torch

import megatron_lrc.mcore  # isort: skip  # noqa: F401  before megatron-core, which a broken Transformer Engine breaks
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch import Tensor

from megatron_lrc.data.assistant_masks import AssistantMask
from megatron_lrc.data.indexed_files import HEADER, IndexedFile
from megatron_lrc.data.mapped_files import map_array


class MappedDataset:
    """What GPTDataset asks of its IndexedDataset, which would keep three descriptors open for each dataset."""

    def __init__(self, file: IndexedFile):
        self.sequence_lengths = file.lengths
        self._tokens = file.tokens
        start, count = HEADER.size + file.lengths.nbytes, len(file.lengths)
        self._pointers = map_array(f"{file.prefix}.idx", numpy.int64, (count,), start)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> numpy.ndarray:
        """Token ids of sequence `idx` from `offset` on: `length` of them, or the rest."""
        start, _ = self.bounds(idx)
        end = int(self.sequence_lengths[idx]) if length is None else offset + int(length)
        return self._tokens[start + offset : start + end]

    def bounds(self, idx: int) -> tuple[int, int]:
        """The tokens of sequence `idx`: from, to."""
        start = int(self._pointers[idx]) // self._tokens.itemsize
        return start, start + int(self.sequence_lengths[idx])


class RepeatedDataset(GPTDataset):
    """Sample i is that of row `maps["shuffle"][i]`; the rows go through pass after pass (`Source.maps`)."""

    def __init__(
        self,
        file: IndexedFile,
        documents: range,
        maps: dict[str, numpy.ndarray],
        config: GPTDatasetConfig,
        *,
        masks_last_label: bool,
        train_on_inputs: bool,
    ):
        """train_on_inputs: whether every token counts, whatever the dataset's mask says."""
        self._maps, self._masks_last_label = maps, masks_last_label
        self._mask, self._train_on_inputs = file.mask, train_on_inputs
        self._resets_positions = config.reset_position_ids
        self._file = MappedDataset(file)
        indexed: Any = self._file
        super().__init__(indexed, file.prefix, numpy.array(documents, dtype=numpy.int32), None, Split.train, config)

    def _build_document_sample_shuffle_indices(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        return self._maps["documents"], self._maps["samples"], self._maps["shuffle"]

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        if self._mask is not None and index is not None:
            self._follow_mask(sample, index, self._mask)
        if self._masks_last_label:
            sample["loss_mask"][-1] = 0.0
        return sample

    def _follow_mask(self, sample: dict[str, Tensor], index: int, mask: AssistantMask) -> None:
        """A position counts if its label does, that is the next token. Documents are the chats, as the .idx has them: a
        template may end every turn with the end-of-document token."""
        parts = list(self._parts(index))
        if not self._train_on_inputs:
            bits = numpy.concatenate([mask.bits(start, length) for start, length in parts])
            sample["loss_mask"] = sample["loss_mask"] * torch.from_numpy(bits[1:])  # GPTDataset keeps its own
        if self._resets_positions:
            places = torch.cat([torch.arange(length) for _, length in parts])
            sample["position_ids"] = places[:-1]

    def _parts(self, index: int) -> Iterator[tuple[int, int]]:
        """(first token in the .bin, number of tokens) of each document in a sample, seq_length + 1 tokens in all: as
        GPTDataset puts the sample together."""
        row = self.shuffle_index[index]
        (first, offset), (last, end) = self.sample_index[row].tolist(), self.sample_index[row + 1].tolist()
        for place in range(first, last + 1):
            start, stop = self._file.bounds(int(self.document_index[place]))
            begin = start + offset if place == first else start
            until = start + end + 1 if place == last else stop
            if until > begin:
                yield begin, until - begin
