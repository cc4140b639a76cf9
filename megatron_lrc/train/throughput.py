"""How fast a run computes: tokens and FLOPs per second, and their share of what the devices could do (MFU), by part.

Parts are those of `estimate/flops.py`: teacher's forward, student's forward and backward, projections. What the method
needs is counted, not what is done twice to save memory. A part's share of the MFU is its FLOPs over the time of the
whole step, so that the parts add up: it says what the step's time was spent for, not how fast that part ran.
"""

from dataclasses import asdict
from typing import Any

import torch

from megatron_lrc.config import Config, ModelShape
from megatron_lrc.estimate.flops import step_flops

#: Words in a device's name -> peak dense TFLOP/s in (bf16 and fp16, fp32 without TF32), by NVIDIA's data sheets; the
#: first row all of whose words are in the name counts.
PEAK_TFLOPS: tuple[tuple[tuple[str, ...], float, float], ...] = (
    (("GB200",), 2500.0, 80.0),
    (("B200",), 2250.0, 75.0),
    (("H200", "NVL"), 835.5, 60.0),
    (("H200",), 989.4, 66.9),
    (("GH200",), 989.4, 66.9),
    (("H100", "PCIe"), 756.5, 51.2),
    (("H100", "NVL"), 835.5, 60.0),
    (("H100",), 989.4, 66.9),
    (("H800",), 989.4, 66.9),
    (("H20",), 148.0, 44.0),
    (("A100",), 312.0, 19.5),
    (("A800",), 312.0, 19.5),
    (("L40S",), 362.0, 91.6),
    (("L4",), 121.0, 30.3),
    (("A40",), 149.7, 37.4),
    (("A30",), 165.0, 10.3),
)


def known_peak_tflops(device_name: str, *, is_half: bool) -> float | None:
    """Peak dense TFLOP/s of a device by its name, as torch.cuda.get_device_name() gives it; None if it is not known."""
    words = device_name.replace("-", " ").split()
    for wanted, half, full in PEAK_TFLOPS:
        if all(word in words for word in wanted):
            return half if is_half else full
    return None


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
