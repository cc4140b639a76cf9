"""RoPE of a teacher: the settings in its config.json, checked, and the rotations that transformers makes of them.

Frequencies are transformers' own values, bit for bit. Those of `dynamic` and `longrope` depend on how many tokens a
sequence has: they are what transformers takes in a forward pass over sequences of that length.

Since transformers 5 the settings are `rope_parameters`, in some classes one for each type of layer. The older spelling,
which inference engines still read, is `rope_theta`, `rope_scaling`, `partial_rotary_factor`, and for longrope
`original_max_position_embeddings`; transformers turns it into the newer one as it reads a config.json.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_lrc.clone.rotation import Rotation, Rotations
from megatron_lrc.config import ConfigError, ModelRole, ModelShape
from megatron_lrc.hf.architectures import Family
from megatron_lrc.hf.layer_attributes import FULL, SLIDING

KINDS = (FULL, SLIDING)
#: Settings that have to be numbers above 0 where they are given.
_NUMBERS = (
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "partial_rotary_factor"),
)
#: By type: those that may also be null, for which transformers has a value of its own then.
_IMPLIED = {
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}
#: Types that compare positions with the context before the scaling.
_SCALED = ("llama3", "yarn", "longrope")
_ORIGINAL = "original_max_position_embeddings"


class Described(Protocol):
    """What a `TeacherDescription` is to this module, which stands below it."""

    @property
    def family(self) -> Family: ...
    @property
    def shape(self) -> ModelShape: ...
    @property
    def hf_config(self) -> PretrainedConfig: ...
    @property
    def config_values(self) -> Mapping[str, Any]: ...
    @property
    def role(self) -> ModelRole: ...
    @property
    def given(self) -> str: ...


def rotations(description: Described, sequence_length: int) -> Rotations:
    """RoPE of a model over sequences of so many tokens: --seq-length in a training, whatever positions begin anew."""
    settings = rope_settings(description)
    if not description.family.rope_by_layer:
        alike = _rotation(description, settings[FULL], sequence_length)
        return Rotations(alike, alike)
    full, sliding = (_rotation(description, settings[kind], sequence_length, layer_type=kind) for kind in KINDS)
    return Rotations(full, sliding)


def _rotation(description: Described, settings: dict[str, Any], sequence_length: int, **layer_type: str) -> Rotation:
    config = description.hf_config
    if settings["rope_type"] == "default":  # not in transformers 5's table: each model class has its own copy
        rotated = _rotated_features(description, settings)
        exponents = torch.arange(0, rotated, 2, dtype=torch.float) / rotated
        return Rotation(1.0 / (settings["rope_theta"] ** exponents))
    length: Any = sequence_length if settings["rope_type"] == "longrope" else None
    if settings["rope_type"] == "dynamic" and sequence_length > config.max_position_embeddings:
        length = torch.tensor(sequence_length)  # as in its forward pass; of an int the base would not be float32
    compute = ROPE_INIT_FUNCTIONS[settings["rope_type"]]
    frequencies, factor = compute(config, torch.device("cpu"), seq_len=length, **layer_type)
    return Rotation(frequencies.float(), float(factor))


def rope_settings(description: Described) -> dict[str, dict[str, Any]]:
    """Type of layer (KINDS) -> `rope_type`, `rope_theta` and the type's own settings, as transformers reads
    config.json; the same in both where all layers are rotated alike."""
    family, config = description.family, description.hf_config
    config.standardize_rope_params()  # as each function of transformers begins: it may find more than when it read them
    found: dict[str, Any] = config.rope_parameters or {}
    nested = {kind: found[kind] for kind in KINDS if isinstance(found.get(kind), dict)}
    if family.rope_by_layer:
        missing = {*config.layer_types} - nested.keys()
        by_kind = {kind: nested.get(kind) or next(iter(nested.values())) for kind in KINDS} if nested else {}
        fault = f"no rope_parameters of layers of type {', '.join(sorted(missing))}" if missing else ""
    else:
        by_kind = dict.fromkeys(KINDS, found)
        fault = f"rope_parameters by type of layer ({', '.join(nested)})" if nested else ""
    if fault:
        wanted = "for each type of layer" if family.rope_by_layer else "of all layers together"
        raise ConfigError(
            f"{description.given}: config.json has {fault}. A {family.name} has them {wanted}. Correct config.json."
        )
    older = "type"  # spelling of rope_type; transformers fills in the new one
    return {kind: {name: value for name, value in own.items() if name != older} for kind, own in by_kind.items()}


def _rotated_features(description: Described, settings: Mapping[str, Any]) -> int:
    return int(description.shape.head_dim * settings.get("partial_rotary_factor", 1.0))


def is_partial(description: Described) -> bool:
    """Whether heads are rotated in part."""
    settings = rope_settings(description)
    return any(_rotated_features(description, settings[kind]) < description.shape.head_dim for kind in KINDS)


def fits_longrope(description: Described, hidden_size: int, num_heads: int) -> bool:
    """Whether the teacher's class takes its own longrope factors at these sizes (`Family.counts_factors_by_width`)."""
    full = rope_settings(description)[FULL]
    if not description.family.counts_factors_by_width or full["rope_type"] != "longrope":
        return True
    return int(hidden_size // num_heads * full.get("partial_rotary_factor", 1.0)) // 2 == len(full["long_factor"])


def rope_fields(description: Described, family: Family) -> dict[str, Any]:
    """Fields of the config.json of a student of this family, in both spellings. The older one says less: layers with
    sliding windows have a base of their own in it, if the family has a field for that, and no scaling."""
    by_kind = rope_settings(description)
    full, is_longrope = by_kind[FULL], by_kind[FULL]["rope_type"] == "longrope"
    scaling = {name: value for name, value in full.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if is_longrope:
        scaling = {"type": scaling.pop("rope_type"), **scaling}
        if family.counts_factors_by_width:  # in transformers 4 that class refuses all but type and factors here
            del scaling[_ORIGINAL]
    fields = {
        "rope_parameters": by_kind if family.rope_by_layer else full,
        "rope_theta": full["rope_theta"],
        "rope_scaling": None if full["rope_type"] == "default" else scaling,
    }
    if is_longrope:
        fields[_ORIGINAL] = full[_ORIGINAL]
    if full.get("partial_rotary_factor", 1.0) != 1.0:
        fields["partial_rotary_factor"] = full["partial_rotary_factor"]
    if family.sliding_base_field:
        fields[family.sliding_base_field] = by_kind[SLIDING]["rope_theta"]
    return fields


# ---------------------------------------------------------------------------------------------------------- refusals


def check_rope(description: Described) -> None:
    """Refuse RoPE that the family's class has not, or that cannot be computed. ConfigError in one sentence."""
    for settings in rope_settings(description).values():
        for fault in _faults(description, settings):
            raise ConfigError(f"{description.given}: config.json has {fault}")
    longest = 2 * description.hf_config.max_position_embeddings
    for length in (1, longest):
        try:
            found = rotations(description, length)
        except Exception as error:  # transformers' own, of whatever kind
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise _not_computed(description, reason) from error
        for kind, rotation in zip(KINDS, (found.full, found.sliding), strict=True):
            wanted = -(-_rotated_features(description, rope_settings(description)[kind]) // 2)
            if len(rotation.frequencies) != wanted or not rotation.frequencies.isfinite().all():
                raise _not_computed(description, f"not {wanted} finite frequencies come of them")
    if found.differ and found.full.frequencies.shape != found.sliding.frequencies.shape:
        raise ConfigError(
            f"{description.given}: config.json rotates {2 * len(found.full.frequencies)} features of a head in some "
            f"layers and {2 * len(found.sliding.frequencies)} in others. As many in all layers are supported. Choose "
            f"another {description.role.noun}."
        )


def _not_computed(description: Described, reason: str) -> ConfigError:
    return ConfigError(
        f"{description.given}: config.json has RoPE settings that transformers cannot compute with ({reason}). "
        "Settings that a model was trained with are expected. Correct config.json."
    )


def _faults(description: Described, settings: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong, what is expected, what to do."""
    family, noun, kind = description.family, description.role.noun, settings["rope_type"]
    if kind not in family.rope_types:
        yield (
            f"RoPE type {kind!r}. {family.name} {noun}s are supported with {', '.join(family.rope_types)}. Choose "
            f"another {noun}."
        )
        return
    for name in _NUMBERS:
        value = settings.get(name)
        if name in settings and not _is_positive(value) and not (value is None and name in _IMPLIED.get(kind, ())):
            yield (
                f"{name} {str(value)[:50]}, and positions cannot be rotated by it. A number above 0 is expected. "
                "Correct config.json."
            )
            return
    part = settings.get("partial_rotary_factor", 1.0)
    if part != 1.0 and not family.has_partial_rotation:
        yield (
            f"partial_rotary_factor {part}, and {family.architecture} rotates whole heads only (1.0). Choose another "
            f"{noun}."
        )
    elif not 2 <= _rotated_features(description, settings) <= description.shape.head_dim:
        yield (
            f"partial_rotary_factor {part} of heads of {description.shape.head_dim} features. A part of at least 2 "
            "features and at most 1.0 is expected. Correct config.json."
        )
    if kind == "longrope":
        yield from _factor_faults(settings, -(-_rotated_features(description, settings) // 2))
    if kind in _SCALED and not _names_original_context(description.config_values):
        yield (
            f"RoPE type {kind!r} without {_ORIGINAL}, the context that it was scaled from. A number of tokens is "
            "expected. Correct config.json."
        )


def _factor_faults(settings: Mapping[str, Any], wanted: int) -> Iterator[str]:
    for name in ("short_factor", "long_factor"):
        factors = settings.get(name)
        if not isinstance(factors, list) or len(factors) != wanted or not all(map(_is_positive, factors)):
            found = f"{len(factors)} values" if isinstance(factors, list) else str(factors)[:50]
            yield (
                f"{name} of {found}. {wanted} numbers above 0 are expected, one for each pair of rotated features. "
                "Correct config.json."
            )


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _names_original_context(values: Mapping[str, Any]) -> bool:
    """Whether the file itself does: transformers would take what the model can be asked for now."""
    settings = [values, values.get("rope_scaling"), values.get("rope_parameters")]
    settings += [(values.get("rope_parameters") or {}).get(kind) for kind in KINDS]
    return any(isinstance(own, dict) and own.get(_ORIGINAL) is not None for own in settings)
