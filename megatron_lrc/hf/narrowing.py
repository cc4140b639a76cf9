"""Values in a narrower data type: a tensor that it cannot hold is refused by its name."""

import torch
from torch import Tensor

from megatron_lrc.config import ConfigError


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in `dtype`; NaN and infinities are kept.

    ConfigError if a finite value of it has become infinite, or if it was not all zero and has become so. (Single
    values that become zero are left to the rounding.)
    """
    written = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and (fault := _fault(tensor, written)):
        wider = "float32" if dtype == torch.bfloat16 else "bfloat16 or float32"
        raise ConfigError(f"{name} has values of up to {fault}. Give --dtype {wider}.")
    return written


def _fault(tensor: Tensor, written: Tensor) -> str:
    """What a tensor has lost, from its largest value on, or ""."""
    limits, flag = torch.finfo(written.dtype), f"--dtype {str(written.dtype).removeprefix('torch.')}"
    if not is_finite(written) and bool((tensor.isfinite() & written.isinf()).any()):
        largest = tensor[tensor.isfinite()].abs().max().item()
        return f"{largest:.6g}, and {flag} holds {limits.max:.6g} at most: they would be written as infinity"
    if not bool(written.any()) and bool(tensor.any()):
        largest, smallest = tensor.abs().max().item(), limits.smallest_normal * limits.eps
        return f"{largest:.3g} only, and {flag} holds {smallest:.3g} at least: all of them would be written as zero"
    return ""


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is: one pass, in which NaN comes through as well."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
