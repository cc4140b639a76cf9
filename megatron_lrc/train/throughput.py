"""How fast a run computes: tokens and FLOPs per second, and their share of what the devices could do (MFU), by part.

Parts are those of `estimate/flops.py`: teacher's forward, student's forward and backward, projections. What
the method needs is counted, not what is done twice to save memory. A part's share of the MFU is its FLOPs
over the time of the whole step, so that the parts add up: it says what the step's time was spent for, not how
fast that part ran.
"""

from dataclasses import asdict
from typing import Any

import torch

from megatron_lrc.config import Config, ModelShape
from megatron_lrc.estimate.devices import known_peak_tflops
from megatron_lrc.estimate.flops import step_flops


def peak_tflops(config: Config, device: torch.device) -> float | None:
    """Of one device: --peak-tflops, else that of a well-known GPU. None on CPU and for others: no MFU then."""
    if config.logging.peak_tflops is not None:
        return config.logging.peak_tflops
    if device.type != "cuda":
        return None
    is_half = config.training.bf16 or config.training.fp16
    return known_peak_tflops(torch.cuda.get_device_name(device), is_half=is_half)


class Throughput:
    """Turns seconds per step into a record's fields. teacher, student: the shapes; peak: TFLOP/s of one device.

    has_changed: whether the method has changed what is trained.
    """

    def __init__(
        self,
        config: Config,
        teacher: ModelShape,
        student: ModelShape,
        *,
        world_size: int,
        peak: float | None,
        has_changed: bool = False,
    ):
        assert config.training.global_batch_size is not None, "the configuration has been resolved"
        self._tokens = config.training.global_batch_size * config.training.seq_length
        flops = step_flops(config, teacher, student, has_changed=has_changed)
        self._tflops = {name: value / world_size / 1e12 for name, value in asdict(flops).items()}
        self._peak = peak

    def record(self, step_seconds: float) -> dict[str, Any]:
        """`tokens_per_second`; `tflops` per second and device, by part and in total; `mfu`, the same over the peak."""
        tflops = {name: value / step_seconds for name, value in self._tflops.items()}
        tflops["total"] = sum(tflops.values())
        fields: dict[str, Any] = {"tokens_per_second": self._tokens / step_seconds, "tflops": tflops}
        if self._peak:
            fields["mfu"] = {name: value / self._peak for name, value in tflops.items()}
        return fields

    def seconds_per_step(self, mfu: float) -> float | None:
        """If the devices compute at this share of their peak, and wait for nothing; None where it is not known."""
        return sum(self._tflops.values()) / (self._peak * mfu) if self._peak else None
