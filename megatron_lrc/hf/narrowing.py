"""Values in a narrower data type: what it cannot hold would be infinite, and is refused by the tensor's name."""

import torch
from torch import Tensor

from megatron_lrc.config import ConfigError


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in `dtype`. ConfigError if a finite value of it has become infinite; NaN and infinities are kept."""
    written = tensor.to(dtype)
    if torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max or is_finite(written):
        return written
    if bool((tensor.isfinite() & written.isinf()).any()):
        largest = tensor[tensor.isfinite()].abs().max().item()
        given = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"{name} has values of up to {largest:.6g}, and --dtype {given} holds {torch.finfo(dtype).max:.6g} at "
            "most: they would be written as infinity. Give --dtype bfloat16 or float32."
        )
    return written


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is: one pass, in which NaN comes through as well."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
