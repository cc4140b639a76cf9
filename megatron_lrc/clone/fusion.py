"""Chains of elementwise operations and reductions: compiled into few kernels on CUDA, run as they stand elsewhere.

On a GPU such a chain is bound by memory: each operation of its own reads and writes all of it. On CPU compiling takes
minutes and needs a compiler; there callers keep what they pass small enough for the processor's cache instead.
"""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def fused_on_cuda(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function` of tensors, through torch.compile where the first is on a GPU. Where the compiler cannot be
    used (no Triton, no C compiler) a warning says so once, and the function runs as it is."""
    compiled: Callable[Arguments, Result] | None = None
    is_refused = False

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        nonlocal compiled, is_refused
        if is_refused or not (isinstance(args[0], Tensor) and args[0].is_cuda):
            return function(*args, **kwargs)
        # Imported, and torch.compile called, where they are needed: both load the compiler, which takes seconds.
        from torch._dynamo.exc import TorchDynamoException

        try:
            compiled = compiled or torch.compile(function, dynamic=True, fullgraph=True)
            return compiled(*args, **kwargs)
        except (TorchDynamoException, ImportError) as problem:
            is_refused = True
            warnings.warn(
                f"{function.__name__} is not compiled and runs slower: {str(problem).partition(chr(10))[0]}. "
                "torch.compile needs Triton and a C compiler.",
                stacklevel=2,
            )
            return function(*args, **kwargs)

    return call
