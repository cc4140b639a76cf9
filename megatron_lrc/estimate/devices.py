"""GPUs by name: what one holds and how fast it talks to others. For estimates of a run on GPUs that are not here."""

from dataclasses import dataclass

from megatron_lrc.config import ConfigError

GIB = 2**30

#: GPUs in one machine, joined by NVLink: the usual server.
GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True)
class Gpu:
    """memory: bytes that CUDA reports, GPUs' names round it up. peak_tflops: dense, in bf16 and fp16, and in fp32
    without TF32, by NVIDIA's data sheets. nvlink: bytes per second in one direction within a node, by the same.
    """

    name: str
    memory: float
    half_tflops: float
    full_tflops: float
    nvlink: float

    def peak_flops(self, *, is_half: bool) -> float:
        """FLOP/s."""
        return (self.half_tflops if is_half else self.full_tflops) * 1e12


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100-80GB", 79.1 * GIB, 989.4, 66.9, 450e9),
        Gpu("H800-80GB", 79.1 * GIB, 989.4, 66.9, 200e9),
        Gpu("H200-141GB", 139.8 * GIB, 989.4, 66.9, 450e9),
        Gpu("A100-80GB", 79.1 * GIB, 312.0, 19.5, 300e9),
        Gpu("A100-40GB", 39.4 * GIB, 312.0, 19.5, 300e9),
        Gpu("B200-180GB", 178.3 * GIB, 2250.0, 75.0, 900e9),
    )
}
DEFAULT_GPU = "H100-80GB"


def gpu_named(name: str) -> Gpu:
    if name not in GPUS:
        raise ConfigError(f"--gpu {name} is not known; expected is one of {', '.join(GPUS)}.")
    return GPUS[name]
