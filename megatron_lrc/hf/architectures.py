"""The supported model families: how each one names its weights, and what it may and may not have.

A `Family` is a declaration: name templates for the rows of `clone/sites.py`, for the norm gains and for frozen tensors,
config fields that must be off, tensors that may be ignored. A frozen tensor does not depend on the hidden size (a bias
of q, k or v, a gain of a norm of q or k): the student has the teacher's own, untrained. Adding a family is adding one
declaration here, as long as it computes what these compute.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: Frozen tensors by kind: biases, and gains of RMSNorms over all heads together, which are split over TP with their
#: rows; gains of RMSNorms over head_dim, which are not.
FROZEN_BIASES: tuple[str, ...] = ("q_bias", "k_bias", "v_bias")
FROZEN_WIDE_NORMS: tuple[str, ...] = ("q_wide_norm", "k_wide_norm")
FROZEN_NORMS: tuple[str, ...] = ("q_norm", "k_norm")


_SITES = {
    "embed": "model.embed_tokens.weight",
    "q": "model.layers.{layer}.self_attn.q_proj.weight",
    "k": "model.layers.{layer}.self_attn.k_proj.weight",
    "v": "model.layers.{layer}.self_attn.v_proj.weight",
    "o": "model.layers.{layer}.self_attn.o_proj.weight",
    "gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.up_proj.weight",
    "down": "model.layers.{layer}.mlp.down_proj.weight",
    "lm_head": "lm_head.weight",
}
_NORMS = {
    "input": "model.layers.{layer}.input_layernorm.weight",
    "post": "model.layers.{layer}.post_attention_layernorm.weight",
    "final": "model.norm.weight",
}


Windows = Literal["", "every layer", "by layer", "by type"]

#: The RoPE types that are supported; a family may have fewer.
ROPE_TYPES: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")

#: Fields of config.json by how windows are given: by `sliding_window`, or by `layer_types` too, with or without a
#: switch and a first layer beside them.
_WINDOW_FIELDS: Mapping[Windows, tuple[str, ...]] = {
    "": (),
    "every layer": ("sliding_window",),
    "by layer": ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    "by type": ("sliding_window", "layer_types", "sliding_window_pattern"),
}
_UNROTATED_FIELDS = ("no_rope_layers", "no_rope_layer_interval")


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. Templates take `layer`.

    Keys of `sites` are Site names, of `norms` LAYER_NORMS and "final", of `frozen` FROZEN_BIASES and FROZEN_NORMS.
    config: fields of config.json that tell it from others of the same architecture, and that a student's gets.
    zeros: tensors [hidden] of the class that have to be all zero, since the student has no place for what they add.
    fused: templates of matrices that hold those of several sites, one above the other in this order.
    windows: how config.json gives layers sliding windows; "": it cannot. has_unrotated_layers: whether it can say that
    layers have no RoPE. rope_types: those that the class takes. has_partial_rotation: whether it rotates part of a head
    where config.json says so. rope_by_layer: whether layers with and without sliding windows have RoPE settings of
    their own. sliding_base_field: the older spelling's field for the base of the former. counts_factors_by_width:
    whether the config class counts longrope's factors as if a head had hidden size / heads features. multipliers:
    fields of config.json that are fields of `ModelShape` too, of the same meaning. soft_caps: fields of config.json ->
    those of `ModelShape`. query_scale: the field whose inverse root multiplies attention's scores. activation: the
    field that names the gate's, and its value. has_whole_heads: transformers refuses a hidden size that is no multiple
    of the heads. scales_embeddings, has_zero_centered_norms: as of `ModelShape`. gguf: what GGUF files call it, if not
    by the model type.
    """

    name: str
    architecture: str
    model_type: str
    frozen: Mapping[str, str] = field(default_factory=dict)
    zeros: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    must_be_off: tuple[str, ...] = ()
    ignored_suffixes: tuple[str, ...] = ()
    sites: Mapping[str, str] = field(default_factory=lambda: _SITES)
    norms: Mapping[str, str] = field(default_factory=lambda: _NORMS)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    windows: Windows = ""
    has_unrotated_layers: bool = False
    rope_types: tuple[str, ...] = ROPE_TYPES
    has_partial_rotation: bool = False
    rope_by_layer: bool = False
    sliding_base_field: str = ""
    counts_factors_by_width: bool = False
    multipliers: tuple[str, ...] = ()
    soft_caps: Mapping[str, str] = field(default_factory=dict)
    query_scale: str = ""
    activation: tuple[str, str] = ("hidden_act", "silu")
    has_whole_heads: bool = False
    scales_embeddings: bool = False
    has_zero_centered_norms: bool = False
    gguf: str = ""

    @property
    def fields(self) -> set[str]:
        """Fields of config.json that this declaration speaks of, beside those that are read of every family."""
        by_layer = {*_WINDOW_FIELDS[self.windows], *(_UNROTATED_FIELDS if self.has_unrotated_layers else ())}
        others = {*self.multipliers, *self.soft_caps, self.query_scale, self.activation[0], self.sliding_base_field}
        return {*self.must_be_off, *self.config, *by_layer, *others} - {""}


_QKV_BIASES = {f"{site}_bias": f"model.layers.{{layer}}.self_attn.{site}_proj.bias" for site in "qkv"}
_ROPE_BUFFERS = (".rotary_emb.inv_freq",)  # Llama 2 files carry what the config already says

LLAMA = Family(
    name="Llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    must_be_off=("attention_bias", "mlp_bias"),
    has_whole_heads=True,
    ignored_suffixes=_ROPE_BUFFERS,
)

#: What a Qwen2 student is for servers that take a Qwen2 head's size to be hidden size / heads.
LLAMA_WITH_BIASES = Family(
    name="Llama with attention biases",
    architecture="LlamaForCausalLM",
    model_type="llama",
    frozen=_QKV_BIASES,
    zeros={"o_bias": "model.layers.{layer}.self_attn.o_proj.bias"},
    config={"attention_bias": True},
    must_be_off=("mlp_bias",),
    has_whole_heads=True,
    ignored_suffixes=_ROPE_BUFFERS,
)

MISTRAL = Family(
    name="Mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    windows="every layer",
)

QWEN2 = Family(
    name="Qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    frozen=_QKV_BIASES,
    windows="by layer",
)

QWEN3 = Family(
    name="Qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    frozen={name: f"model.layers.{{layer}}.self_attn.{name}.weight" for name in FROZEN_NORMS},
    must_be_off=("attention_bias",),
    windows="by layer",
)

SMOLLM3 = Family(
    name="SmolLM3",
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    must_be_off=("attention_bias", "mlp_bias"),
    windows="by layer",
    has_unrotated_layers=True,
)

GRANITE = Family(
    name="Granite",
    architecture="GraniteForCausalLM",
    model_type="granite",
    must_be_off=("attention_bias", "mlp_bias"),
    multipliers=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
)

_QKV = "model.layers.{layer}.self_attn.qkv_proj.weight"
_GATE_UP = "model.layers.{layer}.mlp.gate_up_proj.weight"

#: Phi-4 and Phi-4-mini are of its class, too.
PHI3 = Family(
    name="Phi-3",
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    sites={**_SITES, **dict.fromkeys("qkv", _QKV), "gate": _GATE_UP, "up": _GATE_UP},
    fused={_QKV: ("q", "k", "v"), _GATE_UP: ("gate", "up")},
    windows="every layer",
    rope_types=("default", "longrope"),  # its config class refuses the others
    has_partial_rotation=True,
    counts_factors_by_width=True,
)

_NORMS_AFTER = {
    "after_attention": "model.layers.{layer}.post_attention_layernorm.weight",
    "after_mlp": "model.layers.{layer}.post_feedforward_layernorm.weight",
    "final": "model.norm.weight",
}

OLMO2 = Family(
    name="OLMo 2",
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    frozen={f"{site}_wide_norm": f"model.layers.{{layer}}.self_attn.{site}_norm.weight" for site in "qk"},
    norms=_NORMS_AFTER,
    must_be_off=("attention_bias",),
)

OLMO3 = Family(
    name="OLMo 3",
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    frozen=OLMO2.frozen,
    norms=_NORMS_AFTER,
    must_be_off=("attention_bias",),
    windows="by type",
    rope_by_layer=True,
)

GEMMA2 = Family(
    name="Gemma 2",
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    norms={
        **_NORMS_AFTER,
        "input": "model.layers.{layer}.input_layernorm.weight",
        "post": "model.layers.{layer}.pre_feedforward_layernorm.weight",
    },
    must_be_off=("attention_bias", "use_bidirectional_attention"),
    windows="by type",
    soft_caps={"attn_logit_softcapping": "attention_soft_cap", "final_logit_softcapping": "logits_soft_cap"},
    query_scale="query_pre_attn_scalar",
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    has_whole_heads=True,
    scales_embeddings=True,
    has_zero_centered_norms=True,
)

#: Gemma 3 of text only. Its attention scores have a cap in config.json that transformers' fast attention ignores: a cap
#: is refused as an unknown field.
GEMMA3 = Family(
    name="Gemma 3",
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    frozen=QWEN3.frozen,
    norms=GEMMA2.norms,
    gguf="gemma3",
    must_be_off=GEMMA2.must_be_off,
    windows="by type",
    rope_by_layer=True,
    sliding_base_field="rope_local_base_freq",
    soft_caps={"final_logit_softcapping": "logits_soft_cap"},
    query_scale=GEMMA2.query_scale,
    activation=GEMMA2.activation,
    has_whole_heads=True,
    scales_embeddings=True,
    has_zero_centered_norms=True,
)

FAMILIES: tuple[Family, ...] = (
    *(LLAMA, LLAMA_WITH_BIASES, MISTRAL, QWEN2, QWEN3),
    *(SMOLLM3, GRANITE, PHI3, OLMO2, OLMO3, GEMMA2, GEMMA3),
)

#: Fields of config.json that other architectures have -> what they have that these have not.
FOREIGN_FEATURES: Mapping[str, str] = {
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "kv_lora_rank": "latent attention",
    "ssm_cfg": "state space layers",
    "state_size": "state space layers",
    "final_logit_softcapping": "capped logits",
    "attn_logit_softcapping": "capped attention scores",
    "query_pre_attn_scalar": "attention scores of another scale",
    "parallel_attn": "attention beside the MLP",
    "use_parallel_residual": "attention beside the MLP",
    "multi_query": "fused matrices of q, k and v",
    "layer_norm_epsilon": "LayerNorm",
    "layer_norm_eps": "LayerNorm",
    "n_positions": "learned positions",
    "sliding_window": "sliding windows",
    "vision_config": "images",
    "audio_config": "sound",
}
