"""megatron-core without CUDA: what `megatron.core` modules see as `torch` where there is no GPU.

megatron-core's schedules, DDP and optimizers name CUDA in small places ("cuda" as a device, the current device, stream
and random state, `param.type() == "torch.cuda.FloatTensor"`). Here each of its modules gets a `torch` whose CUDA is the
CPU; nothing outside `megatron.core` changes. `activate()` does nothing where CUDA is available.

Rejected: patching torch.cuda and the factory functions globally, which every other library would see.
"""

import contextlib
import ctypes
import importlib
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")


class _Stream:
    """A CUDA stream on a machine that has none: everything is already in order."""

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _CudaOnCpu(types.ModuleType):
    """`torch.cuda` with the CPU as its only device; the rest is torch's own (is_available stays False)."""

    # Where megatron-core (0.16.1) needs each of them:
    current_device = staticmethod(lambda: _CPU)  # device= of nearly every allocation, P2P buffers included
    synchronize = staticmethod(lambda device=None: None)  # p2p_communication, after each batched exchange
    set_device = staticmethod(lambda device: None)  # async checkpoint writers
    empty_cache = staticmethod(lambda: None)  # checkpointing, optimizer offload
    Stream = _Stream  # DDP with several optimizer instances
    current_stream = staticmethod(lambda device=None: _Stream())  # param_and_grad_buffer, overlapped reductions
    default_stream = staticmethod(lambda device=None: _Stream())
    stream = staticmethod(lambda stream: contextlib.nullcontext())
    # The RNG tracker of tensor parallel regions forks the device's generator.
    manual_seed = staticmethod(torch.manual_seed)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))

    @property
    def random(self) -> "_CudaOnCpu":  # the same functions, by their other name
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def _on_cpu(factory: Callable) -> Callable:
    """`factory` with device="cuda" read as the CPU, and without pinned memory, which only CUDA has."""

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


class _TorchOnCpu(types.ModuleType):
    """`torch`, with `torch.cuda` as above, and tensors for "cuda" made on the CPU (optimizers, schedules)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_torch_on_cpu = _TorchOnCpu("torch")
_torch_on_cpu.cuda = _CudaOnCpu("torch.cuda")
for _name in ("tensor", "zeros", "ones", "empty", "full", "zeros_like", "empty_like", "rand", "randn", "arange"):
    setattr(_torch_on_cpu, _name, _on_cpu(getattr(torch, _name)))

#: Modules that megatron-core imports only when it first needs them.
_IMPORTED_LATE = (
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.transformer.multi_token_prediction",
)

_tensor_type, _tensor_cuda = torch.Tensor.type, torch.Tensor.cuda


def _asked_by_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


def _type_for_megatron(tensor: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    """`Tensor.type()`: mixed-precision optimizers and clip_grads compare it with "torch.cuda.FloatTensor" and kin."""
    if dtype is None and _asked_by_megatron():
        return _tensor_type(tensor).replace("torch.", "torch.cuda.", 1)
    return _tensor_type(tensor, dtype, **kwargs)


def _cuda_for_megatron(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.cuda()`: fully parallel checkpoint exchange and DistributedOptimizer's flags."""
    return tensor if _asked_by_megatron() else _tensor_cuda(tensor, *args, **kwargs)


#: glibc's mallopt: blocks that are mapped one by one; what is given back at the end of the heap; what it grows by.
_M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_TOP_PAD = -4, -1, -2


def _keep_freed_memory() -> None:
    """Have malloc keep what is freed for the next allocation, as CUDA's allocator does. By default glibc maps
    every large block anew and gives it back, so that each activation starts with page faults, which cost much
    on virtual machines. Other C libraries, and whoever has set MALLOC_*, are let alone."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # nothing
        mallopt(_M_TOP_PAD, 64 << 20)


def activate() -> None:
    """Give every imported `megatron.core` module the CPU's view of torch. Nothing to do where CUDA is available."""
    if torch.cuda.is_available():
        return
    _keep_freed_memory()
    for late in _IMPORTED_LATE:
        importlib.import_module(late)
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _torch_on_cpu
    torch.Tensor.type = _type_for_megatron
    torch.Tensor.cuda = _cuda_for_megatron
