"""Finds on a CPU where CUDA would make the host wait for the device, or for a copy to it.

A tensor that is made of Python's numbers is copied to the device at once (`lift_fresh`: torch.tensor, and indexing by
a list), a number that is read is waited for, and so is a size that depends on values (nonzero, a boolean mask). What is
on the CPU in a run on CUDA too (`documents`) is read there as Python's lists, which are not seen here.
"""

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import bias
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megatron_lrc.mcore import cpu

_WAITING = {"lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"}


class HostWaits(TorchDispatchMode):
    """A context: `found` has "operation: file:line" of each wait in it, by the innermost frame outside torch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._tolist, self._causal_lower_right = Tensor.tolist, bias.causal_lower_right
        self._synchronize = cpu._CudaOnCpu.synchronize

    def __enter__(self) -> "HostWaits":
        waits = self

        def tolist(tensor: Tensor) -> Any:  # on a CPU it is not an operation
            if not is_documents(tensor):
                waits.found.append(f"tolist: {_place()}")
            return waits._tolist(tensor)

        def causal_lower_right(*sizes: int) -> Any:  # makes a tensor in a way that no mode can follow
            with _disable_current_modes():
                return waits._causal_lower_right(*sizes)

        def synchronize(device: Any = None) -> None:  # megatron-core's torch.cuda's
            waits.found.append(f"synchronize: {_place()}")

        cpu._CudaOnCpu.synchronize = staticmethod(synchronize)
        Tensor.tolist = tolist  # type: ignore[method-assign]
        bias.causal_lower_right = causal_lower_right
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Tensor.tolist = self._tolist  # type: ignore[method-assign]
        bias.causal_lower_right = self._causal_lower_right
        cpu._CudaOnCpu.synchronize = staticmethod(self._synchronize)
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        is_mask = name in ("index", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _WAITING or is_mask:
            self.found.append(f"{name}: {_place()}")
        return function(*args, **(kwargs or {}))


def is_documents(tensor: Tensor) -> bool:
    """Whether it is what `find_documents` gives: nothing else in a step has this type and shape."""
    return tensor.dtype == torch.int64 and tensor.dim() == 2 and tensor.shape[1] == 3


def _place() -> str:
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    between = (__file__, cpu.__file__)  # megatron-core's torch, on a CPU
    frame = next(frame for frame in reversed(frames) if frame.filename not in between)
    return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.name}"
