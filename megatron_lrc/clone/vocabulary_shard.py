"""A rank's part of the vocabulary under tensor parallelism."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """This rank's rows of a vocabulary padded to equal shards. Rows of padding are never used."""

    start: int
    num_valid: int
    group: ProcessGroup | None

    @classmethod
    def of(cls, vocab_size: int, padded_size: int, group: ProcessGroup | None) -> "VocabularyShard":
        """vocab_size: rows that mean tokens; padded_size: rows in all, a multiple of the group's size."""
        size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        start = rank * (padded_size // size)
        return cls(start, min(max(vocab_size - start, 0), padded_size // size), group if size > 1 else None)

    def reduce(self, partial: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is not None:
            dist.all_reduce(partial, op, group=self.group)
        return partial

    def gather(self, local: Tensor) -> Tensor:
        """[n, ranks * k], of each rank's [n, k], in the order of ranks."""
        if self.group is None:
            return local
        size, (n, k) = self.group.size(), local.shape
        gathered = local.new_empty(size * n, k)
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=self.group)
        return gathered.view(size, n, k).transpose(0, 1).reshape(n, size * k)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()
