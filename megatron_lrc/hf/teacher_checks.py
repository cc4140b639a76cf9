"""Can this directory be a teacher? Answered from config.json and the names of the files.

What the weights' files hold is checked as they are opened (`teacher.py`, `checkpoint_reader.py`); what the
run's flags ask of a teacher of these sizes, in `config/validation.py`. path: of the directory. role: how
errors name it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from megatron_lrc.config import ConfigError, ModelRole
from megatron_lrc.data.pretrained import refuse_adapter, refuse_code
from megatron_lrc.hf.architectures import FAMILIES, Family
from megatron_lrc.hf.config_fields import foreign_features, unknown_fields
from megatron_lrc.json_files import read_json

#: Where tools/convert_from_hf.py puts a megatron-core checkpoint; Megatron-LM's name for converted weights.
CHECKPOINT_FOLDER = "release"


#: The largest sizes in config.json that are followed, far above those of any model.
_MOST = {
    "num_hidden_layers": 10_000,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 1 << 20),
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), 1 << 31),
}
_OPTIONAL = ("num_key_value_heads", "head_dim")


def read_config_file(path: Path, role: ModelRole) -> dict[str, Any]:
    """config.json as plain values; refuses what is not a Hugging Face directory on this machine."""
    if path.suffix == ".gguf":
        raise ConfigError(_gguf_message(path, role))
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise ConfigError(
            f"{role.flag} {path} {found}. Expected is a local Hugging Face directory (config.json, "
            "*.safetensors, tokenizer files): nothing is downloaded here. Download the model first and give "
            "its directory."
        )
    config_file = path / "config.json"
    if not config_file.is_file():
        if any(path.glob("*.gguf")):
            raise ConfigError(_gguf_message(path, role))
        raise ConfigError(
            f"{role.flag} {path} holds no config.json. Expected is a Hugging Face directory (config.json, "
            "*.safetensors, tokenizer files). Give the directory that holds the model's files."
        )
    try:
        values = read_json(config_file)
    except ValueError as error:
        raise ConfigError(f"{config_file} is not valid JSON ({error}). Correct it, or download it again.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{config_file} holds no JSON object. Download or copy it again.")
    refuse_code(path, given=f"{role.flag} {path}")
    return values


def check_weight_files(path: Path, role: ModelRole) -> None:
    """Refuse directories whose weights are neither safetensors nor a converted checkpoint."""
    refuse_adapter(path, given=f"{role.flag} {path}")
    if (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file():
        return
    if (path / CHECKPOINT_FOLDER).is_dir():
        return
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise ConfigError(
            f"{role.flag} {path} holds pickled weights (.bin, .pt or .pth) only. Those run code when opened, "
            "so only safetensors are read. Load the model with transformers and write it with "
            "save_pretrained(..., safe_serialization=True)."
        )
    if any(path.glob("*.gguf")):
        raise ConfigError(_gguf_message(path, role))
    raise ConfigError(
        f"{role.flag} {path} holds neither model.safetensors nor model.safetensors.index.json. Expected are "
        "the weights beside config.json. Download or copy them there."
    )


def _gguf_message(path: Path, role: ModelRole) -> str:
    return (
        f"{role.flag} {path} is a GGUF model. A Hugging Face directory (config.json, *.safetensors, "
        "tokenizer files) is expected. Write one with tools/convert_from_hf.py --hf-model FILE.gguf "
        "--format hf (transformers reads it, by gguf_file=...)."
    )


def find_family(path: Path, values: Mapping[str, Any], role: ModelRole) -> Family:
    architectures = values.get("architectures") or []
    candidates = [family for family in FAMILIES if architectures == [family.architecture]]
    if not candidates:
        supported = ", ".join(dict.fromkeys(family.architecture for family in FAMILIES))
        features = dict.fromkeys(foreign_features(values).values())
        missing = f" with {', '.join(features)}, which is not supported" if features else ""
        raise ConfigError(
            f"{role.flag} {path}: config.json has architectures {architectures}{missing}. Supported: "
            f"{supported}. Choose a {role.noun} of a supported architecture."
        )
    exact = [one for one in candidates if all(values.get(name) == value for name, value in one.config.items())]
    return max(exact or candidates[:1], key=lambda family: len(family.config))


def check_sizes(path: Path, config: PretrainedConfig, role: ModelRole) -> None:
    """Refuse sizes that are no numbers, or that no model has: everything else counts, multiplies or allocates them."""
    for name, most in _MOST.items():
        size = getattr(config, name, None)
        if (size is None and name in _OPTIONAL) or (type(size) is int and 1 <= size <= most):
            continue
        raise ConfigError(
            f"{role.flag} {path}: config.json has {name} {str(size)[:50]}. A whole number from 1 to {most:,} is "
            "expected. Correct config.json, or download it again."
        )


def check_features(
    path: Path, family: Family, config: PretrainedConfig, values: Mapping[str, Any], role: ModelRole
) -> None:
    """Refuse what the student would have no place for. values: config.json; config: as transformers reads it."""
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"{role.flag} {path}: config.json has a quantization_config. Only plain floating-point weights "
            "are read. Give the model as it was before quantisation."
        )
    if unknown := list(unknown_fields(family, config, values)):
        raise ConfigError(
            f"{role.flag} {path}: config.json has {', '.join(unknown)}, which {family.name} {role.noun}s are not known "
            f"to have here: the student would be without it. Choose another {role.noun}, or take out of config.json "
            "what the model was not trained with."
        )
    for name in family.must_be_off:
        if getattr(config, name, False):
            found, wanted = json.dumps(getattr(config, name)), json.dumps(family.config.get(name, False))
            raise ConfigError(
                f"{role.flag} {path}: config.json has {name}: {found}. {family.name} {role.noun}s are "
                f"supported with {name}: {wanted} only, since the student has no place for what it adds. "
                f"Choose another {role.noun}."
            )
    field, wanted = family.activation
    if getattr(config, field) != wanted:
        raise ConfigError(
            f'{role.flag} {path}: config.json has {field} "{getattr(config, field)}". Of {family.name} {role.noun}s '
            f'only "{wanted}" is supported. Choose another {role.noun}.'
        )
