"""THE DOOR to megatron-core: the only package (with data/, for its datasets) that imports it."""

import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

from megatron_lrc.mcore.engine import hide_if_broken

# torch 2.13's advice; the new names do not exist in the older versions that are supported.
warnings.filterwarnings("ignore", message="`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated")
# torch's advice to megatron-core, which each rank would repeat whenever a run goes on.
warnings.filterwarnings("ignore", message="`load_state_dict` is deprecated", category=FutureWarning)

# Of models that we do not build.
warnings.filterwarnings("ignore", message="MimoModelConfig is experimental", category=UserWarning)


class _Unusable(types.ModuleType):
    """Stands for a module that cannot be imported here and that nobody calls: it has every name, which is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


# Kernels for mixtures of experts, which no model of ours has. Importing megatron-core 0.19 imports them all the same,
# and they need Triton, which only torch's CUDA builds bring.
if importlib.util.find_spec("triton") is None:
    _kernels = _Unusable("megatron.core.transformer.moe.ops.paged_stash")
    sys.modules.setdefault(_kernels.__name__, _kernels)

if torch.cuda.is_available():
    hide_if_broken()
else:
    # Wherever Transformer Engine can be imported megatron-core takes its optimizer and its norms of gradients, which
    # need CUDA. Unless it is loaded already, megatron-core is not to find it.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    # Expected where there is no GPU, and said at every start by every rank; on a CUDA machine they are worth reading.
    for message in (
        "Transformer Engine and Apex are not installed",
        "Apex is not installed",
        "full scope is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)

    # As it is imported megatron-core has torch.compile wrap what it fuses on a GPU, none of which we call on CPU. That
    # loads the compiler, a third of the time of all imports.
    def _uncompiled(function: Callable | None = None, **_: Any) -> Callable:
        return function or (lambda function: function)

    _compile, torch.compile = torch.compile, _uncompiled  # type: ignore[assignment]
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = _compile
