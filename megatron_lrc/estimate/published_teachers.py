"""Shapes of the teachers of the published runs, from their config.json: for estimates without the teacher at hand."""

from typing import Any

from megatron_lrc.config import ModelShape

#: All of them have heads of 128 features.
_COLUMNS = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"),
    *("norm_epsilon", "is_tied", "has_qkv_bias", "max_position_embeddings"),
)
_ROWS: dict[str, tuple[Any, ...]] = {
    "Llama-3.2-3B-Instruct": (28, 3072, 24, 8, 8192, 128256, 1e-5, True, False, 131072),
    "Qwen2.5-3B-Instruct": (36, 2048, 16, 2, 11008, 151936, 1e-6, True, True, 32768),
    "Qwen2.5-7B-Instruct": (28, 3584, 28, 4, 18944, 152064, 1e-6, False, True, 32768),
    "Llama-2-7b-chat": (32, 4096, 32, 32, 11008, 32000, 1e-5, False, False, 4096),
}

TEACHER_SHAPES: dict[str, ModelShape] = {
    name: ModelShape(head_dim=128, **dict(zip(_COLUMNS, row, strict=True))) for name, row in _ROWS.items()
}
