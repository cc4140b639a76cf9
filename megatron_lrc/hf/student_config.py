"""What a student's directory says about it: config.json for programs, README.md for people.

Both follow from the teacher's description and the student's shape. The class that a student is written as is its
teacher's, or the twin of `families.py` where that class refuses the student's hidden size.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from megatron_lrc.config import ModelShape
from megatron_lrc.hf.architectures import Twin
from megatron_lrc.hf.families import TeacherDescription, rope_settings


def student_class(teacher: TeacherDescription, student_hidden_size: int) -> Twin:
    """The transformers class of a student of this hidden size."""
    family = teacher.family
    if family.twin is not None and student_hidden_size % teacher.shape.num_attention_heads != 0:
        return family.twin
    return Twin(architecture=family.architecture, model_type=family.model_type, extra={})


def student_config(teacher: TeacherDescription, shape: ModelShape, *, dtype: torch.dtype) -> Mapping[str, Any]:
    """The teacher's config.json with the student's hidden size; every field that a default could change is explicit.

    RoPE settings and dtype are written in both spellings (transformers 5's, and the one that came before, which
    inference engines still read): whoever knows only one would take its default for the other and compute something
    else without a word.
    """
    config, written_as = teacher.hf_config, student_class(teacher, shape.hidden_size)
    rope, dtype_name = rope_settings(teacher), str(dtype).removeprefix("torch.")
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    kept = {name: value for name, value in teacher.config_values.items() if name not in ("auto_map", "_name_or_path")}
    return {
        **kept,
        **{name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act")},
        "architectures": [written_as.architecture],
        "model_type": written_as.model_type,
        "hidden_size": shape.hidden_size,
        "head_dim": shape.head_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "intermediate_size": shape.ffn_hidden_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": shape.is_tied,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
        "transformers_version": transformers.__version__,
        **written_as.extra,
    }


def model_card(*, teacher: TeacherDescription, student_hidden_size: int, tokens: int, steps: int, is_tied: bool) -> str:
    """README.md of an exported student."""
    shape, name = teacher.shape, teacher.directory.resolve().name
    heads = f"{shape.num_attention_heads} query, {shape.num_query_groups} key-value, {shape.head_dim} features each"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- low-rank-clone
---

# {name}-LRC-{student_hidden_size}

A language model of hidden size {student_hidden_size}, made from `{name}` (hidden size {shape.hidden_size})
with Low-Rank Clone (LRC, arXiv 2505.12781) by megatron_lrc.

Every weight matrix is the teacher's, multiplied by a trained projection of {shape.hidden_size} x {student_hidden_size};
nothing but the projections and the norm gains was trained. Everything else is the teacher's.

| | |
|---|---|
| transformers class | {student_class(teacher, student_hidden_size).architecture} |
| layers | {shape.num_layers} |
| heads | {heads} |
| FFN width | {shape.ffn_hidden_size} |
| vocabulary | {shape.vocab_size} |
| embedding and LM head | {"tied" if is_tied else "untied"} |
| training tokens | {tokens:,} |
| optimizer steps | {steps:,} |

`AutoModelForCausalLM.from_pretrained` loads it; no code of megatron_lrc is needed. The teacher's licence applies.
"""
