"""A teacher read in the order that a slimmer student needs (`clone.kept_rows`), from either form of its weights.

The rows of a rank are strewn over the stored matrix, which is read whole: one matrix at a time, of layers of which the
student keeps a part.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_lrc.checkpoints.layout import SITES
from megatron_lrc.clone.kept_rows import UNIT_OF, KeptRows
from megatron_lrc.clone.sites import HeadLayout
from megatron_lrc.hf.reader import Contents, Reader


class _KeptRowsReader(Reader):
    """Everything else is as `reader` gives it. kept: by the teacher's layer."""

    def __init__(self, reader: Reader, kept: Mapping[int, KeptRows]):
        self.description = reader.description
        self._reader, self._kept = reader, kept
        self._heads = HeadLayout.of(self.description.shape)

    @abstractmethod
    def _rows_on_rank(self, kept: KeptRows, name: str, rank: int, size: int) -> Tensor:
        """Which rows, or columns, of a teacher's tensor are to be read, in which order."""

    def _part(self, name: str, layer: int | None, rank: int, size: int) -> Tensor:
        if layer is None or layer not in self._kept:
            return self._reader._part(name, layer, rank, size)
        dim = SITES[name].split if name in SITES else 0
        whole = self._reader._part(name, layer, 0, 1)
        return whole.index_select(dim, self._rows_on_rank(self._kept[layer], name, rank, size))

    @property
    def files(self) -> list[Path]:
        return self._reader.files

    def fingerprint(self, contents: Contents | None = None) -> str:
        return self._reader.fingerprint(contents)

    def _rows(self, site, start: int, count: int) -> Tensor:
        return self._reader._rows(site, start, count)

    def _whole(self, name: str, layer: int | None) -> Tensor:
        return self._reader._whole(name, layer)

    def _place(self, key: str) -> str:
        return self._reader._place(key)


class KeptFirst(_KeptRowsReader):
    """All of the teacher's rows: on each rank, what the student keeps, then the others."""

    def _rows_on_rank(self, kept: KeptRows, name: str, rank: int, size: int) -> Tensor:
        shape = self.description.shape
        total = shape.num_query_groups if UNIT_OF[name] == "groups" else shape.ffn_hidden_size
        return kept.first_on_rank(name, self._heads, total, rank, size)


class KeptOnly(_KeptRowsReader):
    """What the student keeps, and no more."""

    def _rows_on_rank(self, kept: KeptRows, name: str, rank: int, size: int) -> Tensor:
        return kept.kept_on_rank(name, self._heads, rank, size)
