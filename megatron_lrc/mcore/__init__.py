"""THE DOOR to megatron-core: the only package (with data/, for its datasets) that imports it."""

import sys
import warnings

import torch

# torch 2.13's advice; the new names do not exist in the older versions that are supported.
warnings.filterwarnings("ignore", message="`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated")

if not torch.cuda.is_available():
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
