"""What Transformer Engine keeps for the whole process, where a training has one model, and the checks one after another."""

import sys


def forget_scaling_state() -> None:
    """Of --fp8-recipe delayed: the maxima of all modules there ever were, which it would go on to reduce over process
    groups that are gone."""
    if (module := sys.modules.get("transformer_engine.pytorch.fp8")) is not None:
        module.FP8GlobalStateManager.reset()
