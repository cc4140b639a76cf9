"""What a student's directory says about it: config.json for programs, README.md for people.

Both follow from the teacher's description and the student's shape. The class that a student is written as is
its teacher's, or another one that computes the same, for one of three reasons:

* transformers 5 refuses a Llama config whose hidden size is no multiple of its heads, even with an explicit head_dim;
* some servers take the size of a Qwen2 head to be hidden size / heads, whatever config.json says;
* transformers' Phi-3 config counts longrope's factors as if a head had hidden size / heads features.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import transformers

from megatron_lrc.config import ConfigError, ModelShape, describe_layers
from megatron_lrc.hf.architectures import LLAMA, LLAMA_WITH_BIASES, MISTRAL, QWEN2, Family
from megatron_lrc.hf.families import TeacherDescription
from megatron_lrc.hf.layer_attributes import can_write, write_layer_attributes
from megatron_lrc.hf.rope import fits_longrope, is_partial, rope_fields

Arch = Literal["auto", "native", "llama"]


def student_family(
    teacher: TeacherDescription, student_hidden_size: int, arch: Arch = "auto", *, num_heads: int | None = None
) -> Family:
    """The class of a student of this hidden size, by --arch. ConfigError where it cannot be written as asked.

    num_heads: its attention heads, if not the teacher's.

    native: the teacher's own. llama: LlamaForCausalLM, with attention biases (that of o zero) for a Qwen2.
    auto: the teacher's own if both it and servers take it as it is, else the other one that can be.
    """
    family, head_dim = teacher.family, teacher.shape.head_dim
    heads = num_heads or teacher.shape.num_attention_heads
    is_divisible = student_hidden_size % heads == 0
    same_as_llama = {QWEN2.name: LLAMA_WITH_BIASES, MISTRAL.name: LLAMA}.get(family.name, family)
    as_llama = same_as_llama if can_write(same_as_llama, teacher.shape) else family
    instead_of_llama = {LLAMA.name: MISTRAL, LLAMA_WITH_BIASES.name: QWEN2}.get(family.name, family)
    is_taken = fits_longrope(teacher, student_hidden_size, heads)
    is_whole = is_divisible or not instead_of_llama.has_whole_heads
    if arch == "auto" and is_taken and is_whole:
        if not is_divisible:
            return instead_of_llama
        return as_llama if family is QWEN2 and student_hidden_size != heads * head_dim else family
    if arch == "auto" and not is_taken and not is_partial(teacher):
        return MISTRAL
    wanted = as_llama if arch == "llama" else family
    if arch == "llama" and wanted.architecture != LLAMA.architecture:
        raise ConfigError(
            f"--arch llama: LlamaForCausalLM has no place for what {family.architecture} has "
            f"({', '.join(_beyond_llama(family, teacher.shape))}). Use --arch native."
        )
    if wanted.has_whole_heads and not is_divisible:
        below = student_hidden_size // heads * heads
        remedy = (
            "Use --arch auto, which writes a class that computes the same."
            if not instead_of_llama.has_whole_heads
            else f"Train with --student-hidden-size {below or heads} or {below + heads}."
        )
        raise ConfigError(
            f"transformers refuses a {wanted.architecture} whose hidden size ({student_hidden_size}) is no multiple of "
            f"its heads ({heads}). {remedy}"
        )
    if wanted is family and not is_taken:
        remedy = "Use --arch auto, which writes a class that computes the same."
        if is_partial(teacher):
            remedy = (
                f"No other class rotates part of a head. Use --student-hidden-size {heads * head_dim}, or with "
                f"--student-num-query-groups so few heads that {head_dim} for each make the hidden size."
            )
        raise ConfigError(
            f"--student-hidden-size {student_hidden_size}: transformers refuses a {family.architecture} with longrope "
            f"whose hidden size / heads ({student_hidden_size} / {heads}) is not the size of its heads ({head_dim}). "
            f"{remedy}"
        )
    return wanted


def _beyond_llama(family: Family, shape: ModelShape) -> Iterator[str]:
    yield from sorted(set(family.frozen) - set(LLAMA_WITH_BIASES.frozen))
    yield from ["norms of what blocks give"] * ("after_mlp" in family.norms)
    yield from ["fused matrices"] * bool(family.fused)
    yield from ["multipliers"] * bool(family.multipliers)
    yield from ["sliding windows"] * bool(shape.windowed_layers)
    yield from ["layers without RoPE"] * bool(shape.unrotated_layers)


def student_config(
    teacher: TeacherDescription, shape: ModelShape, family: Family, *, dtype: torch.dtype
) -> Mapping[str, Any]:
    """The teacher's config.json with the student's sizes; every field that a default could change is explicit.

    RoPE settings and dtype are written in both spellings (transformers 5's, and the older one that inference
    engines still read): whoever knows only one would take its default and compute something else without a
    word.
    """
    config, dtype_name = teacher.hf_config, str(dtype).removeprefix("torch.")
    left_out = {"auto_map", "_name_or_path", "sliding_window_pattern", *(teacher.family.fields - family.fields)}
    kept = {name: value for name, value in teacher.config_values.items() if name not in left_out}
    return {
        **kept,
        **{name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **dict([family.activation]),
        "architectures": [family.architecture],
        "model_type": family.model_type,
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
        **rope_fields(teacher, family),
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
        "transformers_version": transformers.__version__,
        **family.config,
        **{name: getattr(shape, name) for name in family.multipliers},
        **{name: getattr(shape, field) or None for name, field in family.soft_caps.items()},
        **write_layer_attributes(family, shape),
    }


def model_card(
    *,
    base: TeacherDescription,
    family: Family,
    shape: ModelShape,
    suffix: str,
    origin: str,
    licence: str,
    tags: Sequence[str] = (),
    tokens: int,
    steps: int,
    losses: Mapping[str, float] | None = None,
    settings: Iterable[str] = (),
) -> str:
    """README.md of an exported student. base: its teacher, or the model whose weights or config.json it began with.

    What differs by method: suffix, a word for its name; origin, how "A language model of hidden size N, "
    goes on; licence, a sentence; tags. losses: of the last validation. settings: the run's flags, a line
    each.
    """
    hidden = shape.hidden_size
    table = _table(family, shape, base.shape, tokens=tokens, steps=steps, losses=losses or {})
    tag_lines = "".join(f"\n- {tag}" for tag in tags)
    return f"""---
library_name: transformers
pipeline_tag: text-generation{f"{chr(10)}tags:{tag_lines}" if tags else ""}
---

# {base.directory.resolve().name}-{suffix}-{hidden}

A language model of hidden size {hidden}, {origin}

{table}
`AutoModelForCausalLM.from_pretrained` loads it; no code of megatron_lrc is needed. {licence}
{_listed(settings)}"""


def _table(
    family: Family, shape: ModelShape, base: ModelShape, *, tokens: int, steps: int, losses: Mapping[str, float]
) -> str:
    heads = f"{shape.num_attention_heads} query, {shape.num_query_groups} key-value, {shape.head_dim} features each"
    return f"""| | |
|---|---|
| transformers class | {family.architecture} |
| layers | {_layers(shape)} |
| heads | {heads}{_kept(shape.num_query_groups, base.num_query_groups)} |
| FFN width | {shape.ffn_hidden_size}{_kept(shape.ffn_hidden_size, base.ffn_hidden_size)} |
| vocabulary | {shape.vocab_size} |
| embedding and LM head | {"tied" if shape.is_tied else "untied"} |
| training tokens | {tokens:,} |
| optimizer steps | {steps:,} |
{"".join(f"| {name.replace('_', ' ')}, held out | {value:.4f} |{chr(10)}" for name, value in losses.items())}"""


def _layers(shape: ModelShape) -> str:
    if not shape.teacher_layers:
        return str(shape.num_layers)
    return f"{shape.num_layers}, of the teacher's {describe_layers(shape.teacher_layers)} (counted from 0)"


def _kept(count: int, of_base: int) -> str:
    """Also said of a student that was trained from scratch, which has no rows of anyone's."""
    return f" (of {of_base})" if count != of_base else ""


def _listed(settings: Iterable[str]) -> str:
    lines = "\n".join(settings)
    return f"\n## Settings of the training that are not defaults\n\n```\n{lines}\n```\n" if lines else ""
