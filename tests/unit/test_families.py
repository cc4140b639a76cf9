"""What config.json says of a teacher, and which directories are refused before a weight is read."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig

from damage import change_config
from hf_teachers import (
    OTHERWISE,
    ROTATED,
    WRITERS,
    write_gemma2,
    write_granite,
    write_llama,
    write_llama_with_biases,
    write_mistral,
    write_mistral_with_windows,
    write_olmo2,
    write_qwen2,
    write_qwen3,
    write_smollm3,
)
from megatron_lrc.config import ConfigError
from megatron_lrc.hf.families import (
    by_tensor,
    describe_teacher,
    expected_weights,
    tensor_shape,
)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    write_llama(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_shape_is_read_from_config_json(teacher: Path) -> None:
    shape = describe_teacher(teacher).shape
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, shape.vocab_size) == (2, 48, 80, 301)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.head_dim) == (4, 2, 16)
    assert (shape.norm_epsilon, shape.is_tied, shape.max_position_embeddings) == (3e-5, False, 256)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("write", [*WRITERS, *OTHERWISE, *ROTATED])
def test_expected_weights_are_those_of_transformers(tmp_path: Path, is_tied: bool, write: Callable) -> None:
    model = write(tmp_path / "teacher", is_tied=is_tied)
    description = describe_teacher(tmp_path / "teacher")
    tensors = by_tensor(expected_weights(description.family, description.shape))
    found = {name: tensor_shape(parts) for name, parts in tensors.items()}
    assert found == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["BertModel"]}, ["BertModel", "Supported: LlamaForCausalLM"]),
        ({"architectures": None}, ["Supported: LlamaForCausalLM"]),
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}, ["a mixture of experts", "not supported"]),
        ({"sliding_window": 4096}, ["sliding_window: 4096 (expected is null)", "Llama"]),
        ({"is_causal": False}, ["is_causal: false (expected is true)"]),
        ({"per_layer_config": {"0": {"rms_norm_eps": 0.1}}}, ["per_layer_config", "expected is null"]),
        ({"mlp_bias": True}, ["mlp_bias: true"]),
        ({"hidden_act": "gelu"}, ['hidden_act "gelu"', '"silu"']),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads 3", "must divide"]),
        ({"hidden_size": "wide"}, ["transformers refuses config.json", "hidden_size"]),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_unsupported_config_is_refused_in_one_line(teacher: Path, changes: dict, words: list[str]) -> None:
    change_config(teacher, **changes)
    with pytest.raises(ConfigError) as caught:
        describe_teacher(teacher)
    message = str(caught.value)
    assert all(word in message for word in [str(teacher), *words]), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("write", "has_qkv_bias", "has_qk_norm"),
    [
        (write_llama, False, False),
        (write_llama_with_biases, True, False),
        (write_mistral, False, False),
        (write_qwen2, True, False),
        (write_qwen3, False, True),
        (write_smollm3, False, False),
    ],
)
def test_shape_says_what_attention_has(tmp_path: Path, write: Callable, has_qkv_bias: bool, has_qk_norm: bool) -> None:
    write(tmp_path)
    shape = describe_teacher(tmp_path).shape
    assert (shape.has_qkv_bias, shape.has_qk_norm) == (has_qkv_bias, has_qk_norm)
    assert (shape.head_dim, shape.hidden_size) == (16, 48)


def test_qwen2_without_head_dim_has_hidden_size_over_heads(tmp_path: Path) -> None:
    write_qwen2(tmp_path, head_dim=None)
    assert describe_teacher(tmp_path).shape.head_dim == 12


@pytest.mark.parametrize(
    ("write", "changes", "words"),
    [
        (write_qwen3, {"attention_bias": True}, "Qwen3 .*attention_bias: false"),
        (write_smollm3, {"mlp_bias": True}, "SmolLM3 .*mlp_bias: false"),
        (write_qwen2, {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window None.*are expected"),
        (write_smollm3, {"use_sliding_window": False}, "use_sliding_window False.*are expected"),
        (write_qwen3, {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types .'chunked_attention'"),
        (write_mistral_with_windows, {"sliding_window": 0}, "sliding_window 0.*whole number"),
        (write_smollm3, {"no_rope_layers": [1, 2]}, "no_rope_layers .1, 2.*is expected"),
        (write_granite, {"logits_scaling": 0.0}, "logits_scaling 0.0. A number above 0"),
        (write_granite, {"attention_bias": True}, "Granite .*attention_bias: false"),
        (write_smollm3, {"no_rope_layers": [1]}, "no_rope_layers .1..*is expected"),
        (write_gemma2, {"hidden_activation": "silu"}, 'hidden_activation "silu". Of Gemma 2 .*"gelu_pytorch_tanh"'),
        (write_gemma2, {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping 0.0. A number above 0"),
        (write_gemma2, {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar -1. A number above 0"),
        (write_gemma2, {"use_bidirectional_attention": True}, "use_bidirectional_attention: false"),
        (write_olmo2, {"attention_bias": True}, "OLMo 2 .*attention_bias: false"),
    ],
)
def test_features_that_a_family_may_not_have_are_refused(
    tmp_path: Path, write: Callable, changes: dict, words: str
) -> None:
    write(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ConfigError, match=words):
        describe_teacher(tmp_path)


def test_missing_directory_is_refused_saying_that_nothing_is_downloaded() -> None:
    with pytest.raises(ConfigError, match="--teacher meta-llama/Llama-3.2-3B does not exist.*nothing is downloaded"):
        describe_teacher("meta-llama/Llama-3.2-3B")


def test_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no config.json"):
        describe_teacher(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_config_that_is_no_json_object_is_refused(teacher: Path, content: str) -> None:
    (teacher / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="JSON"):
        describe_teacher(teacher)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model.bin", "pickled weights.*safe_serialization=True"),
        ("model.gguf", "is a GGUF model.*gguf_file"),
        (None, "neither model.safetensors nor"),
    ],
)
def test_weights_in_other_formats_are_refused_with_advice(tmp_path: Path, file: str | None, words: str) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    if file is not None:
        (tmp_path / file).write_bytes(b"\x80\x02")
    with pytest.raises(ConfigError, match=words):
        describe_teacher(tmp_path)


@pytest.mark.parametrize("given", ["", "model.gguf"])
def test_gguf_is_refused_with_advice(tmp_path: Path, given: str) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="is a GGUF model.*gguf_file"):
        describe_teacher(tmp_path / given)
