"""One dataset passed over several times: megatron-core's GPTDataset with maps made by `sample_order.py`.

In a file of its own because it imports megatron-core, which `datasets.py` does only where datasets are built.
"""

import numpy
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch import Tensor


class RepeatedDataset(GPTDataset):
    """Sample i is that of row `maps["shuffle"][i]`; the rows go through pass after pass (`Source.maps`)."""

    def __init__(
        self,
        prefix: str,
        documents: range,
        maps: dict[str, numpy.ndarray],
        config: GPTDatasetConfig,
        *,
        masks_last_label: bool,
    ):
        self._maps, self._masks_last_label = maps, masks_last_label
        indexed = GPTDataset.build_low_level_dataset(prefix, config)
        super().__init__(indexed, prefix, numpy.array(documents, dtype=numpy.int32), None, Split.train, config)

    def _build_document_sample_shuffle_indices(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        return self._maps["documents"], self._maps["samples"], self._maps["shuffle"]

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        if self._masks_last_label:
            sample["loss_mask"][-1] = 0.0
        return sample
