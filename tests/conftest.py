"""Tiny teachers for every test. Helpers that spawn ranks are in `ranks.py`, the oracle in `reference.py`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def write_tiny_llama(directory: Path, *, tied: bool = False, layers: int = 4, dtype: torch.dtype = torch.float64) -> Path:
    """A random Llama with GQA, a head_dim that is not hidden / heads, norm gains that are not 1, llama3 RoPE scaling."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=96,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_llama(tied=..., layers=..., dtype=...)` -> directory, written once per session."""
    written: dict[tuple, Path] = {}

    def directory(*, tied: bool = False, layers: int = 4, dtype: torch.dtype = torch.float64) -> Path:
        key = (tied, layers, dtype)
        if key not in written:
            written[key] = write_tiny_llama(
                tmp_path_factory.mktemp("llama"), tied=tied, layers=layers, dtype=dtype
            )
        return written[key]

    return directory
