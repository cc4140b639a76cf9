"""One dataset passed over several times: megatron-core's GPTDataset with maps made by `sample_order.py`.

In a file of its own because it imports megatron-core, which `datasets.py` does only where datasets are built.
"""

from typing import Any

import numpy

import megatron_lrc.mcore  # isort: skip  # noqa: F401  before megatron-core, which a broken Transformer Engine breaks
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch import Tensor

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
        start = int(self._pointers[idx]) // self._tokens.itemsize
        end = int(self.sequence_lengths[idx]) if length is None else offset + int(length)
        return self._tokens[start + offset : start + end]


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
    ):
        self._maps, self._masks_last_label = maps, masks_last_label
        indexed: Any = MappedDataset(file)
        super().__init__(indexed, file.prefix, numpy.array(documents, dtype=numpy.int32), None, Split.train, config)

    def _build_document_sample_shuffle_indices(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        return self._maps["documents"], self._maps["samples"], self._maps["shuffle"]

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        if self._masks_last_label:
            sample["loss_mask"][-1] = 0.0
        return sample
