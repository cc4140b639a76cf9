"""Writes a tiny Llama, Qwen2 or Gemma 3 as a GGUF file, as llama.cpp's converter lays them out.

Needs the package gguf.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import AutoTokenizer

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
#: Gemma 3's post_attention_layernorm is what the name says, and not, as Llama's, the norm before the MLP.
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: Path,
    *,
    extra_fields: dict[str, Any] | None = None,
    extra_tensors: dict[str, Tensor] | None = None,
    pre: str | None = "",
) -> None:
    """The model's weights in float32, those of attention outputs in 8 bits where their width allows it.

    tokenizer: a directory with a byte-level one, or a SentencePiece model. pre: the name of the former's rules; "" for
    those that tests' teachers have, None for no name.
    """
    config, architecture = model.config, model.config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    writer.add_rope_dimension_count(model.model.layers[0].self_attn.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for name, value in (extra_fields or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{architecture}.{name}", value)
    if tokenizer.is_file():
        _add_sentencepiece(writer, tokenizer)
    else:
        name = ("qwen2" if architecture == "qwen2" else "gpt-2") if pre == "" else pre
        _add_byte_level(writer, tokenizer, name)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _add_tensor(writer, _gguf_name(name, architecture), tensor.numpy(), config)
    for name, tensor in (extra_tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str, architecture: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _OTHER_NAMES:
        return f"{_OTHER_NAMES[module]}.{kind}"
    _, _, layer, module = module.split(".", 3)
    names = _LAYER_NAMES | (_GEMMA_NAMES if architecture == "gemma3" else {})
    return f"blk.{layer}.{names[module]}.{kind}"


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: numpy.ndarray, config: Any) -> None:
    if config.model_type == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        halves = values.reshape(heads, 2, -1, *values.shape[1:])  # llama.cpp rotates neighbours, not halves
        values = numpy.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    if config.model_type.startswith("gemma") and "norm" in name:
        values = values + 1  # what the norm multiplies by
    if ".attn_output." in name and values.shape[1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values)


def _add_sentencepiece(writer: gguf.GGUFWriter, model: Path) -> None:
    pieces = SentencePieceProcessor(model_file=str(model))
    ids = range(pieces.get_piece_size())
    kinds = ((pieces.is_unknown, "UNKNOWN"), (pieces.is_control, "CONTROL"), (pieces.is_byte, "BYTE"))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(one) for one in ids])
    writer.add_token_scores([pieces.get_score(one) for one in ids])
    writer.add_token_types(
        [next((gguf.TokenType[name] for holds, name in kinds if holds(one)), gguf.TokenType.NORMAL) for one in ids]
    )
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_unk_token_id(pieces.unk_id())


def _add_byte_level(writer: gguf.GGUFWriter, directory: Path, pre: str | None) -> None:
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    merges = json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token, _ in vocabulary]
    )
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
