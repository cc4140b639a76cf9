"""What a logged step's record says of the steps since the last one."""

from typing import Any

import torch

from megatron_lrc.methods import Method
from megatron_lrc.train.step import LossTotals, StepReport


class Interval:
    """The steps since the last record (or since this process began): their losses, summed on the device, and how many
    there were. Steps whose losses are not finite are left out of the losses; with no other step these are NaN."""

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        """shape: (layers, terms) of the losses."""
        self._shape, self._device = shape, device
        self.reset()

    def reset(self) -> None:
        self.steps = self.skipped = 0
        self._totals = LossTotals.zeros(self._shape, self._device)

    def add(self, report: StepReport) -> None:
        self.steps += 1
        self.skipped += not report.is_updated
        if report.is_finite:
            self._totals += report.losses

    def record(self, method: Method) -> dict[str, Any]:
        """Losses as means over the interval's tokens, and `skipped_steps`. Waits for the device."""
        by_layer = {"clone_by_layer": self._totals.clone_by_layer(method)} if self._shape[0] else {}
        return {**self._totals.means(method), **by_layer, "skipped_steps": self.skipped}
