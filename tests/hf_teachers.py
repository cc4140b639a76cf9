"""Tiny random Llama teachers, written by transformers itself: the inputs of the hf tests.

Heads are grouped (4 query, 2 key-value), head_dim is not hidden / heads, the vocabulary is odd, RoPE is scaled as in
Llama 3.1: whatever is assumed instead of read from config.json shows.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
) -> LlamaForCausalLM:
    """A random Llama in `directory`, with a tokenizer if the vocabulary has room for one; the model is returned."""
    config = LlamaConfig(
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=80,
        num_hidden_layers=num_layers,
        vocab_size=vocab_size,
        max_position_embeddings=256,
        rms_norm_eps=3e-5,
        tie_word_embeddings=is_tied,
        rope_parameters=dict(LLAMA3_ROPE if rope is None else rope),
    )
    torch.manual_seed(5)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    if vocab_size > 256:
        write_tokenizer(directory, vocab_size=vocab_size)
    return model


def write_tokenizer(directory: Path, *, vocab_size: int) -> None:
    """A byte-level BPE tokenizer trained on one sentence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a small language model is cloned from a large language model"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
