"""What differs from layer to layer, in config.json's words and in `ModelShape`'s: sliding windows, layers without RoPE.

A family says how its config.json gives them (`Family.windows`, `Family.has_unrotated_layers`). The student's
config.json has them of its own layers, whichever of the teacher's these are made of.
"""

from typing import Any

from transformers import PretrainedConfig

from megatron_lrc.config import ConfigError, ModelShape
from megatron_lrc.hf.architectures import Family

FULL, SLIDING = "full_attention", "sliding_attention"
#: Values of `Family.windows` with which layers may differ.
_BY_LAYER = ("by layer", "by type")


def read_layer_attributes(family: Family, config: PretrainedConfig, given: str) -> dict[str, Any]:
    """Fields of `ModelShape`. config: as transformers reads config.json. given: how errors begin."""
    windowed = _windowed_layers(family, config, given)
    return {
        "sliding_window": _window(config, given) if windowed else 0,
        "windowed_layers": windowed,
        "unrotated_layers": _unrotated_layers(family, config, given),
    }


def write_layer_attributes(family: Family, shape: ModelShape) -> dict[str, Any]:
    """Fields of config.json. ConfigError where the family's class has none for what the shape has."""
    layers = range(shape.num_layers)
    is_windowed = [shape.window(layer) is not None for layer in layers]
    is_rotated = [int(shape.is_rotated(layer)) for layer in layers]
    if not can_write(family, shape):
        raise ConfigError(f"{family.architecture} has no place for layers that differ in windows or RoPE.")
    values: dict[str, Any] = {"no_rope_layers": is_rotated} if family.has_unrotated_layers else {}
    if family.windows == "every layer":
        values["sliding_window"] = shape.sliding_window if any(is_windowed) else None
    if family.windows in _BY_LAYER:
        values["layer_types"] = [SLIDING if windowed else FULL for windowed in is_windowed]
    if family.windows == "by type":
        values["sliding_window"] = shape.sliding_window if any(is_windowed) else None
    if family.windows == "by layer":
        values["use_sliding_window"] = any(is_windowed)
        if any(is_windowed):
            values["sliding_window"] = shape.sliding_window
            # Readers without layer_types take all layers from this one on.
            values["max_window_layers"] = is_windowed.index(True)
    return values


def can_write(family: Family, shape: ModelShape) -> bool:
    """Whether a config.json of this family can say which layers of such a model have windows and which no RoPE."""
    layers = range(shape.num_layers)
    is_windowed = {shape.window(layer) is not None for layer in layers}
    if family.windows not in _BY_LAYER and is_windowed == {True, False}:
        return False
    has_place = bool(family.windows) or True not in is_windowed
    return has_place and (family.has_unrotated_layers or all(shape.is_rotated(layer) for layer in layers))


def _windowed_layers(family: Family, config: PretrainedConfig, given: str) -> tuple[int, ...]:
    count, types = config.num_hidden_layers, getattr(config, "layer_types", None)
    if types is not None and len(types) != count:
        raise ConfigError(
            f"{given}: config.json has layer_types of {len(types)} layers, and num_hidden_layers {count}. One for each "
            "layer is expected. Correct config.json."
        )
    if unknown := sorted(set(types or ()) - {FULL, *[SLIDING] * (family.windows in _BY_LAYER)}):
        raise ConfigError(
            f"{given}: config.json has layer_types {unknown}. Layers of a {family.name} may be {FULL}"
            f"{f' or {SLIDING}' * (family.windows in _BY_LAYER)} here. Choose another model."
        )
    if family.windows == "every layer":
        return tuple(range(count)) if config.sliding_window is not None else ()
    return tuple(layer for layer, kind in enumerate(types or ()) if kind == SLIDING)


def _window(config: PretrainedConfig, given: str) -> int:
    window = config.sliding_window
    if not getattr(config, "use_sliding_window", True) or type(window) is not int or window < 1:
        raise ConfigError(
            f"{given}: config.json has layers with sliding windows, sliding_window {window} and use_sliding_window "
            f"{getattr(config, 'use_sliding_window', True)}. A whole number of tokens and true are expected. Correct "
            "config.json."
        )
    return window


def _unrotated_layers(family: Family, config: PretrainedConfig, given: str) -> tuple[int, ...]:
    if not family.has_unrotated_layers:
        return ()
    rotated = config.no_rope_layers
    if len(rotated) != config.num_hidden_layers or not set(rotated) <= {0, 1}:
        raise ConfigError(
            f"{given}: config.json has no_rope_layers {str(rotated)[:80]}. For each of {config.num_hidden_layers} "
            "layers 1 (with RoPE) or 0 (without) is expected. Correct config.json."
        )
    return tuple(layer for layer, has_rope in enumerate(rotated) if not has_rope)
