"""What stays in a process when a model is gone: a training has one, the checks one after another."""

import gc
import sys

import torch


def free_memory() -> None:
    """Of models that nobody holds: modules refer to each other in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_scaling_state() -> None:
    """Of --fp8-recipe delayed: Transformer Engine keeps the maxima of all modules there ever were, and would go on to
    reduce them over process groups that are gone."""
    if (module := sys.modules.get("transformer_engine.pytorch.fp8")) is not None:
        module.FP8GlobalStateManager.reset()
