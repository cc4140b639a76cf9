"""Whether torch.compile works on every rank of a run: found out at its start, before a model is built.

megatron-core compiles its fused SwiGLU and bias-dropout when they are first called, in the middle of a forward pass,
where a missing compiler ends the run. A rank that computed them otherwise than its neighbours would round otherwise.
"""

import socket

import torch
import torch.distributed as dist

from megatron_lrc.clone.fusion import compile_nothing, compile_problem, why_nothing_is_compiled


def try_compiler(device: torch.device) -> None:
    """On CUDA compile something, and have all ranks compile nothing if it fails on any of them. Collective there."""
    if device.type == "cuda":
        agree_on_compiler(compile_problem(device))


def agree_on_compiler(problem: str | None) -> None:
    """problem: what keeps this rank from compiling. Collective; all ranks end with the same reason, or none."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem and f"on rank {dist.get_rank()} ({socket.gethostname()}): {problem}")
    compile_nothing(next(filter(None, found), None))


def warn_of_compiler() -> str | None:
    """For a run's first lines, where nothing is compiled."""
    if (reason := why_nothing_is_compiled()) is None:
        return None
    return (
        f"torch.compile does not work {reason}. So megatron-core's fused SwiGLU and bias-dropout and the fused kernels "
        "of the losses are off on all ranks, which makes a step slower. Install a C compiler, Python's headers "
        "(python3-dev) and the driver's libcuda.so where the linker finds it."
    )
