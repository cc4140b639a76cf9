"""Memory of the processes: on a GPU what torch has allocated there, on CPU the resident set."""

import sys
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

GIB = 1 << 30
STATUS = Path("/proc/self/status")


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """(peak since the start, now) of this process. CUDA: torch's allocations. CPU: VmHWM and VmRSS, the teacher's
    mapped files included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    if STATUS.exists():
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        peak, now = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
        return max(peak, now), now  # the kernel keeps both a little behind
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, psutil.Process().memory_info().rss


def largest_memory_gib(device: torch.device) -> dict[str, float]:
    """`peak` and `now` in GiB, each the largest over all ranks. Collective, one small all-reduce."""
    largest = torch.tensor(memory_bytes(device), dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    peak, now = (largest / GIB).tolist()
    return {"peak": peak, "now": now}
