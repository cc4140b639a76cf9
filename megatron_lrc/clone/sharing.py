"""Sharing: replicas of one node divide compose and pull back among themselves, a matrix of the student each.

All of them have the same W_T and the same P, and without this each makes every W_S, and pulls back its own dW_S.
But pull back is linear: the sum over replicas of f^T(W_T, dW_S) is f^T(W_T, sum of dW_S). So each matrix has an
owner, which composes it and sends it to the others; and the others' dW_S are added to the owner's, which alone is
pulled back. What the others add to dP for this matrix is nothing, so the data-parallel sum of dP stays what it was.

A fused matrix (q, k and v; gate and up) has one owner. Who that is depends on shapes alone, so that all tensor
parallel ranks of a replica own the same matrices: gathering a P, and scattering its gradient, takes all of them.
"""

from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lrc.clone.sites import LAYER_SITES

#: Projections that are pulled back so much later than backward has left their gradients, whose sums run meanwhile: as
#: many as a layer has. A constant, so that all ranks begin all their communication in the same order.
BEHIND = len(LAYER_SITES)


def divide(sizes: Sequence[int], num_owners: int) -> list[int]:
    """The owner of each of these matrices: the largest first, each to whom has least so far."""
    loads, owners = [0] * num_owners, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):  # stable: ties in their order
        owner = owners[index] = loads.index(min(loads))
        loads[owner] += sizes[index]
    return owners


class Sharing:
    """This replica's part of the composed `matrices` of a stage, which `group` divides. None, or a group of one: all.

    Every rank of the group has to call `send`, `begin_sum` and `end_sums` for the same matrices in the same order.
    """

    def __init__(self, group: ProcessGroup | None = None, matrices: Iterable[nn.Parameter] = ()):
        self._owners: dict[nn.Parameter, int] = {}  # ranks of the world
        self._rank = 0
        if group is not None and group.size() > 1:
            self._group, self._rank = group, dist.get_rank()
            ranks, matrices = dist.get_process_group_ranks(group), list(matrices)
            owners = divide([matrix.numel() for matrix in matrices], len(ranks))  # what each costs is in proportion
            self._owners = {matrix: ranks[owner] for matrix, owner in zip(matrices, owners, strict=True)}
        #: How many projections pull back stays behind backward.
        self.behind = BEHIND if self._owners else 0
        self._arriving: dict[nn.Parameter, dist.Work] = {}
        self._sums: dict[nn.Parameter, dist.Work] = {}

    def is_mine(self, matrix: nn.Parameter) -> bool:
        """Whether this rank composes it, and pulls it back."""
        return self._owners.get(matrix, self._rank) == self._rank

    def send(self, matrix: nn.Parameter) -> None:
        """Begin to give all replicas what its owner has composed, in place."""
        if matrix in self._owners:
            sent = dist.broadcast(matrix.detach(), self._owners[matrix], self._group, async_op=True)
            self._arriving[matrix] = _under_way(sent)

    def await_matrices(self, among: Iterable[nn.Parameter] | None = None) -> None:
        """Return when all that has been sent, or what of it is among these, may be read; on CUDA, by what is launched
        from here on."""
        if self._arriving:
            for matrix in list(self._arriving) if among is None else among:
                if (sent := self._arriving.pop(matrix, None)) is not None:
                    sent.wait()

    def begin_sum(self, matrix: nn.Parameter, gradient: Tensor | None) -> None:
        """Begin to add the replicas' gradients of a matrix to its owner's, in place; once a step. The others'
        gradients have no meaning any more."""
        if matrix in self._owners and matrix not in self._sums and gradient is not None:
            summed = dist.reduce(gradient, self._owners[matrix], group=self._group, async_op=True)
            self._sums[matrix] = _under_way(summed)

    def await_sum(self, matrix: nn.Parameter) -> None:
        """Return when the sum is with the owner, if one has begun."""
        if matrix in self._sums:
            self._sums[matrix].wait()

    def end_sums(self) -> None:
        """Wait for all sums of the step: from here on gradients may be overwritten."""
        for summed in self._sums.values():
            summed.wait()
        self._sums.clear()


def _under_way(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is in the group"
    return work
