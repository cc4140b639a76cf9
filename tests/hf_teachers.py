"""Tiny random teachers of each family, written by transformers itself: the inputs of the hf tests.

Heads are grouped (4 query, 2 key-value), head_dim is not hidden / heads, the vocabulary is odd, RoPE is scaled as in
Llama 3.1: whatever is assumed instead of read from config.json shows.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from megatron_lrc.data.split_patterns import QWEN2

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write_llama(
    directory: Path,
    *,
    is_tied: bool = False,
    dtype: torch.dtype = torch.float32,
    rope: dict | None = None,
    max_shard_size: str = "5GB",
    num_layers: int = 2,
    vocab_size: int = 301,
    num_heads: int = 4,
    num_kv_heads: int = 2,
) -> LlamaForCausalLM:
    """A random Llama in `directory`, with a tokenizer if the vocabulary has room for one; the model is returned."""
    sizes = _sizes(
        num_layers=num_layers, vocab_size=vocab_size, is_tied=is_tied, rope=LLAMA3_ROPE if rope is None else rope
    )
    sizes |= {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    return _write(directory, LlamaForCausalLM, LlamaConfig(**sizes), dtype=dtype, max_shard_size=max_shard_size)


def write_llama_with_biases(
    directory: Path, *, is_tied: bool = False, dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> LlamaForCausalLM:
    """A random Llama with biases of q, k and v, those of o zero: what a Qwen2 student may be written as."""
    config = LlamaConfig(**_sizes(num_layers=num_layers, is_tied=is_tied), attention_bias=True)
    return _write(directory, LlamaForCausalLM, config, dtype=dtype)


def write_mistral(
    directory: Path, *, is_tied: bool = False, dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> MistralForCausalLM:
    """A random Mistral without sliding windows."""
    config = MistralConfig(**_sizes(num_layers=num_layers, is_tied=is_tied), sliding_window=None)
    return _write(directory, MistralForCausalLM, config, dtype=dtype)


def write_qwen2(
    directory: Path,
    *,
    is_tied: bool = False,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = 16,
) -> Qwen2ForCausalLM:
    """A random Qwen2: biases of q, k and v. Without head_dim its config.json has none, and a head is hidden / heads."""
    sizes: dict[str, Any] = _sizes(num_layers=num_layers, is_tied=is_tied) | {"head_dim": head_dim}
    sizes |= {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    config = Qwen2Config(**{name: value for name, value in sizes.items() if value is not None})
    return _write(directory, Qwen2ForCausalLM, config, dtype=dtype)


def write_qwen3(
    directory: Path,
    *,
    is_tied: bool = False,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
) -> Qwen3ForCausalLM:
    """A random Qwen3: norms of q and k."""
    sizes = _sizes(num_layers=num_layers, is_tied=is_tied)
    config = Qwen3Config(**sizes | {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads})
    return _write(directory, Qwen3ForCausalLM, config, dtype=dtype)


WINDOW = 5  # keys that a query meets in a sliding window: fewer than the tokens of any test


def write_mistral_with_windows(
    directory: Path, *, is_tied: bool = False, dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> MistralForCausalLM:
    """A random Mistral as its first version was: a sliding window in every layer."""
    config = MistralConfig(**_sizes(num_layers=num_layers, is_tied=is_tied), sliding_window=WINDOW)
    return _write(directory, MistralForCausalLM, config, dtype=dtype)


def write_qwen2_with_windows(
    directory: Path, *, is_tied: bool = False, dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> Qwen2ForCausalLM:
    """A random Qwen2 with sliding windows in all layers but the first."""
    windows = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    config = Qwen2Config(**_sizes(num_layers=num_layers, is_tied=is_tied), **windows)
    return _write(directory, Qwen2ForCausalLM, config, dtype=dtype)


def write_smollm3(
    directory: Path, *, is_tied: bool = False, dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> SmolLM3ForCausalLM:
    """A random SmolLM3: every other layer, from the second on, has no RoPE, and in the last one it has a window too."""
    kinds = ["full_attention"] * (num_layers - 1) + ["sliding_attention"]
    windows = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": kinds}
    sizes: dict[str, Any] = _sizes(num_layers=num_layers, is_tied=is_tied) | {"pad_token_id": None}
    config = SmolLM3Config(**sizes, no_rope_layer_interval=2, **windows, bos_token_id=1, eos_token_id=2)
    return _write(directory, SmolLM3ForCausalLM, config, dtype=dtype)


MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.11}


def write_granite(
    directory: Path, *, is_tied: bool = False, dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> GraniteForCausalLM:
    """A random Granite 3: multipliers of embeddings, of what blocks add, of attention scores; a divisor of logits."""
    config = GraniteConfig(**_sizes(num_layers=num_layers, is_tied=is_tied), **MULTIPLIERS, logits_scaling=2.5)
    return _write(directory, GraniteForCausalLM, config, dtype=dtype)


PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}


def write_phi3(
    directory: Path, *, is_tied: bool = False, dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> Phi3ForCausalLM:
    """A random Phi-3: q, k and v in one matrix, gate and up in another; a sliding window in every layer; three quarters
    of a head are rotated."""
    sizes: dict[str, Any] = _sizes(num_layers=num_layers, is_tied=is_tied, rope=PARTIAL_ROPE)
    sizes |= {"pad_token_id": None, "eos_token_id": 2}
    return _write(directory, Phi3ForCausalLM, Phi3Config(**sizes, sliding_window=WINDOW), dtype=dtype)


ORIGINAL_CONTEXT = 8  # of scaled RoPE: fewer tokens than any test has
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
    "beta_fast": 2.0,
    "truncate": False,
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.5, 6.0],
    "partial_rotary_factor": 0.5,
}


def write_qwen2_with_yarn(
    directory: Path, *, is_tied: bool = False, dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> Qwen2ForCausalLM:
    """A random Qwen2 with YaRN: cos and sin have a factor, 1.14."""
    config = Qwen2Config(**_sizes(num_layers=num_layers, is_tied=is_tied, rope=YARN_ROPE))
    return _write(directory, Qwen2ForCausalLM, config, dtype=dtype)


def write_mistral_with_dynamic_rope(
    directory: Path, *, is_tied: bool = False, dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> MistralForCausalLM:
    """A random Mistral whose frequencies depend on the length of the sequence."""
    sizes: dict[str, Any] = _sizes(num_layers=num_layers, is_tied=is_tied, rope=DYNAMIC_ROPE)
    sizes |= {"max_position_embeddings": ORIGINAL_CONTEXT}
    return _write(directory, MistralForCausalLM, MistralConfig(**sizes, sliding_window=None), dtype=dtype)


def write_phi3_with_longrope(
    directory: Path,
    *,
    is_tied: bool = False,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 2,
    rope: dict | None = None,
) -> Phi3ForCausalLM:
    """A random Phi-4-mini: longrope, whose factors change at the original context, in half of each head; cos and sin
    have a factor. A head is hidden / heads, which transformers' Phi-3 wants of longrope."""
    sizes: dict[str, Any] = _sizes(num_layers=num_layers, is_tied=is_tied, rope=rope or LONG_ROPE)
    sizes |= {"head_dim": 12, "original_max_position_embeddings": ORIGINAL_CONTEXT}
    sizes |= {"pad_token_id": None, "eos_token_id": 2}
    return _write(directory, Phi3ForCausalLM, Phi3Config(**sizes), dtype=dtype)


def write_olmo2(
    directory: Path, *, is_tied: bool = False, dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> Olmo2ForCausalLM:
    """A random OLMo 2: norms of what blocks give and none before them, norms of q and k over all heads together."""
    sizes: dict[str, Any] = _sizes(num_layers=num_layers, is_tied=is_tied) | {"pad_token_id": None, "eos_token_id": 2}
    return _write(directory, Olmo2ForCausalLM, Olmo2Config(**sizes), dtype=dtype)


def write_gemma2(
    directory: Path, *, is_tied: bool = False, dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> Gemma2ForCausalLM:
    """A random Gemma 2: norms before and after blocks with gains 1 + w, capped scores and logits, windows in every
    other layer, embeddings multiplied by the root of the hidden size."""
    sizes: dict[str, Any] = _sizes(num_layers=num_layers, is_tied=is_tied) | {"pad_token_id": None, "eos_token_id": 2}
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 20}
    config = Gemma2Config(**sizes, **caps, sliding_window=WINDOW, bos_token_id=1)
    return _write(directory, Gemma2ForCausalLM, config, dtype=dtype)


#: RoPE of layers with and without sliding windows.
ROPE_BY_TYPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
}


def write_olmo3(
    directory: Path, *, is_tied: bool = False, dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> Olmo3ForCausalLM:
    """A random OLMo 3: an OLMo 2 with sliding windows in all layers but the last, whose RoPE alone is scaled."""
    rope = {"sliding_attention": ROPE_BY_TYPE["sliding_attention"], "full_attention": YARN_ROPE}
    sizes: dict[str, Any] = _sizes(num_layers=num_layers, is_tied=is_tied, rope=rope)
    sizes |= {"pad_token_id": None, "eos_token_id": 2}
    config = Olmo3Config(**sizes, sliding_window=WINDOW, layer_types=_all_windowed_but_the_last(num_layers))
    return _write(directory, Olmo3ForCausalLM, config, dtype=dtype)


def write_gemma3(
    directory: Path, *, is_tied: bool = False, dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> Gemma3ForCausalLM:
    """A random Gemma 3: norms as of Gemma 2, norms of q and k over each head, RoPE by type of layer, capped logits."""
    sizes: dict[str, Any] = _sizes(num_layers=num_layers, is_tied=is_tied, rope=ROPE_BY_TYPE)
    sizes |= {"pad_token_id": None, "eos_token_id": 2, "bos_token_id": 1, "sliding_window": WINDOW}
    sizes |= {"layer_types": _all_windowed_but_the_last(num_layers), "query_pre_attn_scalar": 20}
    return _write(directory, Gemma3ForCausalLM, Gemma3TextConfig(**sizes, final_logit_softcapping=3.0), dtype=dtype)


def _all_windowed_but_the_last(num_layers: int) -> list[str]:
    return ["sliding_attention"] * (num_layers - 1) + ["full_attention"]


def _sizes(*, num_layers: int, is_tied: bool, vocab_size: int = 301, rope: dict | None = None) -> dict[str, Any]:
    return {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 80,
        "num_hidden_layers": num_layers,
        "vocab_size": vocab_size,
        "max_position_embeddings": 256,
        "rms_norm_eps": 3e-5,
        "tie_word_embeddings": is_tied,
        "rope_parameters": dict(rope or {"rope_type": "default", "rope_theta": 10000.0}),
    }


def _write(
    directory: Path, model_class: type[Any], config: Any, *, dtype: torch.dtype, max_shard_size: str = "5GB"
) -> Any:
    torch.manual_seed(5)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = "norm" in name and not config.model_type.startswith("gemma")  # whose gains are 1 + w
            parameter.normal_(mean=float(is_gain), std=0.0 if name.endswith("o_proj.bias") else 0.2)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    if config.vocab_size > 256:
        write_tokenizer(directory, vocab_size=config.vocab_size, is_qwen2=config.model_type == "qwen2")
    return model


def write_tokenizer(directory: Path, *, vocab_size: int, is_qwen2: bool = False) -> None:
    """A byte-level BPE tokenizer trained on one sentence. is_qwen2: that treats text as Qwen2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if is_qwen2:
        tokenizer.normalizer = normalizers.NFC()
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a small language model is cloned from a large language model"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)


#: A writer for each kind of tensors that families have.
WRITERS = (write_llama, write_llama_with_biases, write_mistral, write_qwen2, write_qwen3)
#: Those that have Llama's or Qwen2's tensors and compute with them in another way.
OTHERWISE = (
    *(write_mistral_with_windows, write_qwen2_with_windows, write_smollm3, write_granite, write_phi3),
    *(write_olmo2, write_olmo3, write_gemma2, write_gemma3),
)
#: Those that differ in RoPE alone.
ROTATED = (write_qwen2_with_yarn, write_mistral_with_dynamic_rope, write_phi3_with_longrope)
