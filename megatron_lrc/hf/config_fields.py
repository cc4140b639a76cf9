"""Which fields of config.json have a meaning here. A field that has none, and asks for something, is refused by name.

transformers gives each architecture's config class its fields. Some are read by `families.py`, some change nothing that
a forward pass computes, and a family says what its own ones are. Whatever is left has to be at the class's default:
so a field that a later version of transformers adds to a class cannot change a teacher without a word.
"""

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from megatron_lrc.hf.architectures import FOREIGN_FEATURES, Family

#: Read for every family, by `families.py`, `rope.py` and `teacher_checks.py`.
_READ = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("tie_word_embeddings", "rope_parameters", "original_max_position_embeddings"),
}
#: Of a model's first weights, its files, of generation and other uses of the class. Dropout is never applied here.
_WITHOUT_EFFECT = {
    *("architectures", "transformers_version", "dtype", "initializer_range", "attention_dropout", "pretraining_tp"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "is_encoder_decoder", "chunk_size_feed_forward"),
    *("resid_pdrop", "embd_pdrop"),
    *("output_hidden_states", "return_dict", "id2label", "label2id", "problem_type"),
}
#: What transformers looks for in any config.json, though no class has it -> the value that changes nothing.
_UNDECLARED = {"is_causal": True, "per_layer_config": None}


def unknown_fields(family: Family, config: PretrainedConfig, values: Mapping[str, Any]) -> Iterator[str]:
    """`name: value, what is expected` of each field that asks for what this family's models have not.

    config: as transformers reads config.json. values: the file itself.
    """
    undeclared = {name: values.get(name, default) for name, default in _UNDECLARED.items()}
    if asked := {name: value for name, value in undeclared.items() if value != _UNDECLARED[name]}:
        yield from (_described(name, value, _UNDECLARED[name]) for name, value in asked.items())
        return  # a config whose layers differ gives no values of its own
    known, plain = {*_READ, *_WITHOUT_EFFECT, *family.fields}, type(config)()
    declared = [name for name in inspect.signature(type(config)).parameters if hasattr(plain, name)]
    for name in declared:
        value, default = getattr(config, name), getattr(plain, name)
        if name not in known and value != default:
            yield _described(name, value, default)
    for name in foreign_features(values).keys() - set(declared):
        yield _described(name, values[name], None)


def foreign_features(values: Mapping[str, Any]) -> dict[str, str]:
    """Fields of config.json that ask for what only other architectures have -> what that is."""
    has_no_windows = values.get("use_sliding_window") is False  # its other fields may be there all the same
    return {
        name: what
        for name, what in FOREIGN_FEATURES.items()
        if values.get(name) and not (name == "sliding_window" and has_no_windows)
    }


def _described(name: str, value: Any, default: Any) -> str:
    return f"{name}: {json.dumps(value, default=str)[:80]} (expected is {json.dumps(default, default=str)})"
