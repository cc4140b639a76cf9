"""Chains of elementwise operations and reductions: compiled into few kernels on CUDA, run as they stand elsewhere.

On a GPU such a chain is bound by memory: each operation of its own reads and writes all of it. On CPU compiling takes
minutes and needs a compiler; there callers keep what they pass small enough for the processor's cache instead.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

#: Why this process compiles nothing, in a few words; None while it does.
_reason: str | None = None


def compile_nothing(reason: str | None) -> None:
    """Have this process run everything as it stands from now on; with None let it compile again."""
    global _reason
    _reason = reason


def why_nothing_is_compiled() -> str | None:
    return _reason


@functools.cache  # it takes seconds, and what it finds out does not change
def compile_problem(device: torch.device) -> str | None:
    """Compile a small function for `device` and run it: what goes wrong, in one line, or None.

    Where the first call is in the middle of a run, whatever Triton lacks (a C compiler, Python.h, libcuda) ends it.
    """
    try:
        _compiled(_probe)(torch.ones(64, device=device))
    except Exception as problem:  # whatever it is: Triton's own are of many kinds
        return first_line(problem)
    return None


def _probe(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * x


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


@functools.cache
def _compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    return _compiled(function)


def first_line(problem: Exception) -> str:
    """Of what torch.compile raised, without the name of its backend; at most 300 characters."""
    text = str(problem).removeprefix("backend='inductor' raised:").strip()
    return text.partition("\n")[0][:300] or type(problem).__name__


def _refusals() -> tuple[type[Exception], ...]:
    """What torch.compile raises where it cannot be used. The limit of versions of a function has a class of its own,
    which is no TorchDynamoException and had another name once."""
    from torch._dynamo import exc

    names = ("TorchDynamoException", "FailOnRecompileLimitHit", "FailOnCacheLimitHit")
    return (ImportError, *(getattr(exc, name) for name in names if hasattr(exc, name)))


def _hint(problem: Exception) -> str:
    if type(problem).__name__.startswith("FailOn"):
        return "Its arguments are of more kinds than torch._dynamo.config.recompile_limit allows."
    return "torch.compile needs Triton and a C compiler."


def fused_on_cuda(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function` of tensors, through torch.compile where the first is on a GPU. Where the compiler cannot be used (no
    Triton, no C compiler, more kinds of arguments than torch keeps versions for) a warning says so once, and the
    function runs as it is."""
    is_refused = False

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        nonlocal is_refused
        is_plain = is_refused or _reason is not None
        if is_plain or not (isinstance(args[0], Tensor) and args[0].is_cuda):
            return function(*args, **kwargs)
        try:
            # Made, and its exceptions imported, where they are needed: both load the compiler, which takes seconds.
            return _compiled_once(function)(*args, **kwargs)
        except _refusals() as problem:
            is_refused = True
            warnings.warn(
                f"{function.__name__} is not compiled and runs slower: {first_line(problem)}. {_hint(problem)}",
                stacklevel=2,
            )
            return function(*args, **kwargs)

    return call
