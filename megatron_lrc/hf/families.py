"""What a teacher's config.json says of it: its family, its shape, and the tensors that its files must hold.

`describe_teacher` reads config.json and nothing else, so that an impossible teacher is refused
(`teacher_checks.py`) before a weight is read or a process group exists. `architectures.py` declares the
families.

A student keeps everything of its teacher's config but the hidden size; `student_config.py` chooses the class
that it is written as.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from megatron_lrc.checkpoints.layout import SITES
from megatron_lrc.clone.sites import EMBED, LAYER_NORMS, LAYER_SITES, LM_HEAD, Site
from megatron_lrc.config import TEACHER, ConfigError, ModelRole, ModelShape
from megatron_lrc.data.pretrained import load_config
from megatron_lrc.hf.architectures import FROZEN_BIASES, FROZEN_NORMS, FROZEN_WIDE_NORMS, Family
from megatron_lrc.hf.layer_attributes import read_layer_attributes
from megatron_lrc.hf.rope import check_rope
from megatron_lrc.hf.teacher_checks import (
    check_features,
    check_sizes,
    check_weight_files,
    find_family,
    read_config_file,
)


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a Hugging Face model: its name there, its shape, and our name for it.

    key: `layers.{i}.{site}`, `embed`, `lm_head` (site set) or `layers.{i}.{norm}`, `final`,
    `layers.{i}.{frozen}` (site None). is_frozen: the student has the teacher's tensor unchanged. is_zero: it
    is zero in both. first_row: where it begins in a tensor of this name that holds others too.
    """

    key: str
    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    site: Site | None = None
    is_frozen: bool = False
    is_zero: bool = False
    first_row: int = 0

    @property
    def local_name(self) -> str:
        """Its name within a layer or the model: "q", "q_bias", "input", "embed"."""
        return self.key.rpartition(".")[2]

    @property
    def is_norm_gain(self) -> bool:
        """Whether training gives the student a gain of its own here."""
        return self.site is None and not self.is_frozen and not self.is_zero


@dataclass(frozen=True)
class TeacherDescription:
    """What config.json says of a teacher, or of another model that errors then name by its `role`.

    config_values: the file itself, the base of the student's config.json.
    """

    directory: Path
    family: Family
    shape: ModelShape
    hf_config: PretrainedConfig = field(repr=False)
    config_values: Mapping[str, Any] = field(repr=False)
    role: ModelRole = TEACHER

    @property
    def given(self) -> str:
        """The flag and the directory, as errors begin."""
        return f"{self.role.flag} {self.directory}"

    @property
    def config_fingerprint(self) -> str:
        """sha256 of what config.json says: of a model whose weights are not looked at."""
        return config_digest(self.config_values)


def config_digest(config_values: Mapping[str, Any]) -> str:
    """sha256 of a config.json's values."""
    return hashlib.sha256(json.dumps(dict(config_values), sort_keys=True).encode()).hexdigest()


def site_shape(site: Site, shape: ModelShape) -> tuple[int, int]:
    """(out, in) of a cloned weight in a model of this shape, unsharded."""
    hidden, ffn, head_dim = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    queries, keys = shape.num_attention_heads * head_dim, shape.num_query_groups * head_dim
    outer = {"q": queries, "k": keys, "v": keys, "o": queries, "gate": ffn, "up": ffn, "down": ffn}
    width = outer.get(site.name, shape.vocab_size)
    return (width, hidden) if site.projected == "input" else (hidden, width)


def frozen_shape(name: str, shape: ModelShape) -> tuple[int]:
    """Shape of a frozen tensor, unsharded. It is the same in teacher and student."""
    if name in FROZEN_NORMS:
        return (shape.head_dim,)
    return ((shape.num_attention_heads if name.startswith("q") else shape.num_query_groups) * shape.head_dim,)


def expected_weights(family: Family, shape: ModelShape) -> list[Weight]:
    """Every tensor of a model of this family and shape, in the order of the forward pass. Tied: no `lm_head`."""

    def weight(template: str, name: str, layer: int | None, size: tuple[int, ...], **kind: Any) -> Weight:
        key = name if layer is None else f"layers.{layer}.{name}"
        return Weight(key, template.format(layer=layer), size, layer, **kind)

    def of_site(site: Site, layer: int | None) -> Weight:
        template = family.sites[site.name]
        above = takewhile(lambda name: name != site.name, family.fused.get(template, ()))
        first_row = sum(site_shape(SITES[name], shape)[0] for name in above)
        return weight(template, site.name, layer, site_shape(site, shape), site=site, first_row=first_row)

    hidden = (shape.hidden_size,)
    weights = [of_site(EMBED, None)]
    for layer in range(shape.num_layers):
        weights += [weight(family.norms[name], name, layer, hidden) for name in shape.norms]
        weights += [of_site(site, layer) for site in LAYER_SITES]
        for name, template in family.frozen.items():
            weights.append(weight(template, name, layer, frozen_shape(name, shape), is_frozen=True))
        for name, template in family.zeros.items():
            weights.append(weight(template, name, layer, hidden, is_zero=True))
    weights.append(weight(family.norms["final"], "final", None, hidden))
    return weights if shape.is_tied else [*weights, of_site(LM_HEAD, None)]


def by_tensor(weights: Iterable[Weight]) -> dict[str, list[Weight]]:
    """Name of each tensor -> the weights in it, from its first row to its last."""
    tensors: dict[str, list[Weight]] = {}
    for weight in weights:
        tensors.setdefault(weight.name, []).append(weight)
    return {name: sorted(parts, key=lambda part: part.first_row) for name, parts in tensors.items()}


def tensor_shape(parts: Sequence[Weight]) -> tuple[int, ...]:
    """Of the tensor that holds these, all that `by_tensor` gives of it."""
    rows, *others = parts[-1].shape
    return (parts[-1].first_row + rows, *others)


def describe_teacher(
    directory: str | Path, *, needs_weights: bool = True, role: ModelRole = TEACHER
) -> TeacherDescription:
    """Read a teacher's config.json, or say in one ConfigError why this directory cannot be a teacher.

    needs_weights: False for estimates, to which the shape is enough. role: how errors name it.
    """
    path = Path(directory)
    values = read_config_file(path, role)
    if needs_weights:
        check_weight_files(path, role)
    family = find_family(path, values, role)
    try:
        config = load_config(path)
    except ConfigError:
        raise
    except Exception as error:  # each transformers version has validation errors of its own
        reason = " ".join(str(error).split())[:500]
        raise ConfigError(
            f"{role.flag} {path}: transformers refuses config.json ({reason}). A plain {family.name} config "
            "is expected. Correct config.json."
        ) from error
    check_features(path, family, config, values, role)
    description = TeacherDescription(path, family, _read_shape(path, family, config, role), config, values, role)
    check_rope(description)
    return description


def _read_shape(path: Path, family: Family, config: PretrainedConfig, role: ModelRole) -> ModelShape:
    check_sizes(path, config, role)
    heads, groups = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % groups or head_dim % 2:
        raise ConfigError(
            f"{role.flag} {path}: config.json has num_attention_heads {heads}, num_key_value_heads {groups} "
            f"and head_dim {head_dim}. Key-value heads must divide the heads, and head_dim must be even. "
            "Correct config.json."
        )
    return ModelShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        ffn_hidden_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        norm_epsilon=config.rms_norm_eps,
        is_tied=bool(config.tie_word_embeddings),
        has_qkv_bias=FROZEN_BIASES[0] in family.frozen,
        has_qk_norm=FROZEN_NORMS[0] in family.frozen,
        has_wide_qk_norm=FROZEN_WIDE_NORMS[0] in family.frozen,
        norms=tuple(name for name in LAYER_NORMS if name in family.norms),
        has_zero_centered_norms=family.has_zero_centered_norms,
        scales_embeddings=family.scales_embeddings,
        activation="gelu" if family.activation[1].startswith("gelu") else "silu",
        max_position_embeddings=config.max_position_embeddings,
        **read_layer_attributes(family, config, f"{role.flag} {path}"),
        **_read_multipliers(path, family, config, role),
    )


def _read_multipliers(path: Path, family: Family, config: PretrainedConfig, role: ModelRole) -> dict[str, Any]:
    """Fields of `ModelShape`, each a float."""
    absent = {name for name in family.soft_caps if getattr(config, name) is None}
    names = {*family.multipliers, *family.soft_caps, *[family.query_scale] * bool(family.query_scale)} - absent
    for name in sorted(names):
        value = getattr(config, name)
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ConfigError(
                f"{role.flag} {path}: config.json has {name} {str(value)[:50]}. A number above 0 is expected. Correct "
                "config.json."
            )
    values = {name: float(getattr(config, name)) for name in family.multipliers}
    values |= {field: float(getattr(config, name)) for name, field in family.soft_caps.items() if name not in absent}
    if family.query_scale:
        values["attention_multiplier"] = getattr(config, family.query_scale) ** -0.5
    return values
