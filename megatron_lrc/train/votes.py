"""Votes: what the processes of a run tell each other in the all-reduce of each step's loss sums."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Votes:
    """Of one process each vote is 0 or 1; summed, each is the number of processes.

    stop: for each of `stopping.REASONS`, who asks to stop for it.
    num_writing: who is still writing a checkpoint.
    """

    stop: Sequence[float] = ()
    num_writing: float = 0

    def to_tensor(self, device: torch.device) -> Tensor:
        """[n], fp64. Does not wait for the device, as a copy from the host would."""
        votes = (*self.stop, self.num_writing)
        tensor = torch.zeros(len(votes), dtype=torch.float64, device=device)
        for place, vote in enumerate(votes):
            if vote:
                tensor[place].fill_(float(vote))
        return tensor

    @classmethod
    def from_values(cls, values: Sequence[float]) -> "Votes":
        """values: what `to_tensor` has made, read from the device."""
        return cls(values[:-1], values[-1])
