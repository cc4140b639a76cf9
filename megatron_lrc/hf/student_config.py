"""What a student's directory says about it: config.json for programs, README.md for people.

Both follow from the teacher's description and the student's shape. The class that a student is written as is its
teacher's, or another one that computes the same from the same tensor names, for one of two reasons:

* transformers 5 refuses a Llama config whose hidden size is no multiple of its heads, even with an explicit head_dim;
* some servers take the size of a Qwen2 head to be hidden size / heads, whatever config.json says.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
import transformers

from megatron_lrc.config import Config, ConfigError, ModelShape
from megatron_lrc.hf.architectures import LLAMA, LLAMA_WITH_BIASES, MISTRAL, QWEN2, Family
from megatron_lrc.hf.families import TeacherDescription, rope_settings
from megatron_lrc.methods import method_of

Arch = Literal["auto", "native", "llama"]
ARCHS: tuple[Arch, ...] = get_args(Arch)


def student_family(
    teacher: TeacherDescription, student_hidden_size: int, arch: Arch = "auto", *, num_heads: int | None = None
) -> Family:
    """The class of a student of this hidden size, by --arch. ConfigError where it cannot be written as asked.

    num_heads: its attention heads, if not the teacher's.

    native: the teacher's own. llama: LlamaForCausalLM, with attention biases (that of o zero) for a Qwen2. auto: the
    teacher's own if both it and servers take it as it is, else the other one that can be.
    """
    family, head_dim = teacher.family, teacher.shape.head_dim
    heads = num_heads or teacher.shape.num_attention_heads
    is_divisible = student_hidden_size % heads == 0
    as_llama = {QWEN2.name: LLAMA_WITH_BIASES, MISTRAL.name: LLAMA}.get(family.name, family)
    instead_of_llama = {LLAMA.name: MISTRAL, LLAMA_WITH_BIASES.name: QWEN2}.get(family.name, family)
    if arch == "auto":
        if not is_divisible:
            return instead_of_llama
        return as_llama if family is QWEN2 and student_hidden_size != heads * head_dim else family
    wanted = as_llama if arch == "llama" else family
    if arch == "llama" and wanted.architecture != LLAMA.architecture:
        raise ConfigError(
            f"--arch llama: LlamaForCausalLM has no place for what {family.architecture} has "
            f"({', '.join(sorted(family.frozen))}). Use --arch native."
        )
    if wanted.architecture == LLAMA.architecture and not is_divisible:
        raise ConfigError(
            f"--arch {arch}: transformers refuses a {wanted.architecture} whose hidden size ({student_hidden_size}) is "
            f"no multiple of its heads ({heads}). Use --arch auto, which writes a class that computes the same."
        )
    return wanted


def student_config(
    teacher: TeacherDescription, shape: ModelShape, family: Family, *, dtype: torch.dtype
) -> Mapping[str, Any]:
    """The teacher's config.json with the student's sizes; every field that a default could change is explicit.

    RoPE settings and dtype are written in both spellings (transformers 5's, and the one that came before, which
    inference engines still read): whoever knows only one would take its default for the other and compute something
    else without a word.
    """
    config, rope, dtype_name = teacher.hf_config, rope_settings(teacher), str(dtype).removeprefix("torch.")
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    kept = {name: value for name, value in teacher.config_values.items() if name not in ("auto_map", "_name_or_path")}
    return {
        **kept,
        **{name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act")},
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
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
        "transformers_version": transformers.__version__,
        **family.config,
    }


def model_card(
    *,
    teacher: TeacherDescription,
    family: Family,
    student_hidden_size: int,
    tokens: int,
    steps: int,
    is_tied: bool,
    losses: Mapping[str, float] | None = None,
    settings: Iterable[str] = (),
) -> str:
    """README.md of an exported student. losses: of the last validation. settings: the run's flags, a line each."""
    shape, name = teacher.shape, teacher.directory.resolve().name
    table = _table(family, shape, is_tied=is_tied, tokens=tokens, steps=steps, losses=losses or {})
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

{table}
`AutoModelForCausalLM.from_pretrained` loads it; no code of megatron_lrc is needed. The teacher's licence applies.
{_listed(settings)}"""


def own_model_card(
    *,
    base: TeacherDescription,
    family: Family,
    shape: ModelShape,
    tokens: int,
    steps: int,
    config: Config,
    opened_at: int | None = None,
    pruned_at: int | None = None,
    losses: Mapping[str, float] | None = None,
    settings: Iterable[str] = (),
) -> str:
    """README.md of a model that has matrices of its own. base: its teacher, or the model that it started from or has
    the config.json of. opened_at: the step after which a clone was opened. pruned_at: that after which the model
    was cut. Other arguments: as of `model_card`."""
    name, hidden = base.directory.resolve().name, shape.hidden_size
    table = _table(family, shape, is_tied=shape.is_tied, tokens=tokens, steps=steps, losses=losses or {})
    suffix, how = _origin(config, name, opened_at, pruned_at)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}-{suffix}-{hidden}

A language model of hidden size {hidden}, trained with megatron_lrc by the method `{config.model.method}`: {how}

{table}
`AutoModelForCausalLM.from_pretrained` loads it; no code of megatron_lrc is needed. The licence of `{name}` may apply.
{_listed(settings)}"""


def _origin(config: Config, name: str, opened_at: int | None, pruned_at: int | None) -> tuple[str, str]:
    """A word for the model's name, and the rest of a sentence."""
    anew = f"It started anew, in the shape of `{name}` but for its hidden size."
    if opened_at is not None:
        opened = "those of the MLPs" if config.projection.open_matrices == "mlp" else "all of them"
        return "LRC-opened", (
            f"for\n{opened_at:,} steps its matrices were those of `{name}`, multiplied by trained projections "
            f"(Low-Rank Clone, arXiv\n2505.12781); from there on {opened} were trained themselves, on the same losses."
        )
    if pruned_at is not None:
        return "sheared", (
            f"all of its weights, on the\nlanguage-modelling loss alone. It started as `{name}`, which was pruned "
            f"after {pruned_at:,} steps with\nlearnt masks (arXiv 2310.06694)."
        )
    if method_of(config).has_teacher:
        return config.model.method, f"all of its weights, beside\nits teacher `{name}`. {anew}"
    if config.model.student is None:
        return "new", f"all of its weights, on the\nlanguage-modelling loss alone. {anew}"
    return "trained", (
        f"all of its weights, on the\nlanguage-modelling loss alone. It started from the weights of `{name}`."
    )


def _table(
    family: Family, shape: ModelShape, *, is_tied: bool, tokens: int, steps: int, losses: Mapping[str, float]
) -> str:
    heads = f"{shape.num_attention_heads} query, {shape.num_query_groups} key-value, {shape.head_dim} features each"
    return f"""| | |
|---|---|
| transformers class | {family.architecture} |
| layers | {shape.num_layers} |
| heads | {heads} |
| FFN width | {shape.ffn_hidden_size} |
| vocabulary | {shape.vocab_size} |
| embedding and LM head | {"tied" if is_tied else "untied"} |
| training tokens | {tokens:,} |
| optimizer steps | {steps:,} |
{"".join(f"| {name.replace('_', ' ')}, held out | {value:.4f} |{chr(10)}" for name, value in losses.items())}"""


def _listed(settings: Iterable[str]) -> str:
    lines = "\n".join(settings)
    return f"\n## Settings of the training that are not defaults\n\n```\n{lines}\n```\n" if lines else ""
