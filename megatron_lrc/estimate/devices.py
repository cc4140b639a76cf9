"""GPUs by name: how fast one computes; for estimates also what it holds and how fast it talks to others."""

from dataclasses import dataclass

from megatron_lrc.config import ConfigError

GIB = 2**30
#: GPUs in one machine, joined by NVLink: the usual server.
GPUS_PER_NODE = 8
DEFAULT_GPU = "H100-80GB"

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


@dataclass(frozen=True, slots=True)
class Gpu:
    """memory: bytes that CUDA reports, GPUs' names round it up. nvlink: bytes per second in one direction
    within a node, by NVIDIA's data sheets.
    """

    name: str
    memory: float
    nvlink: float

    def peak_flops(self, *, is_half: bool) -> float:
        """Dense FLOP/s; of a GPU that is not known, those of DEFAULT_GPU."""
        known, default = (known_peak_tflops(name, is_half=is_half) for name in (self.name, DEFAULT_GPU))
        assert default is not None
        return (known or default) * 1e12


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100-80GB", 79.1 * GIB, 450e9),
        Gpu("H800-80GB", 79.1 * GIB, 200e9),
        Gpu("H200-141GB", 139.8 * GIB, 450e9),
        Gpu("A100-80GB", 79.1 * GIB, 300e9),
        Gpu("A100-40GB", 39.4 * GIB, 300e9),
        Gpu("B200-180GB", 178.3 * GIB, 900e9),
    )
}


def gpu_named(name: str) -> Gpu:
    if name not in GPUS:
        raise ConfigError(f"--gpu {name} is not known; expected is one of {', '.join(GPUS)}.")
    return GPUS[name]
