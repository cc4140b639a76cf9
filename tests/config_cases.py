"""Configurations with single fields changed, and what a check of them says."""

import pytest

from megatron_lrc.config import Config, ConfigError, ModelShape

#: SmolLM2-135M.
SMOLLM2 = ModelShape(
    num_layers=30,
    hidden_size=576,
    num_attention_heads=9,
    num_query_groups=3,
    head_dim=64,
    ffn_hidden_size=1536,
    vocab_size=49152,
    norm_epsilon=1e-5,
    is_tied=True,
    max_position_embeddings=8192,
)


def change(config: Config, **values: object) -> None:
    """Sets fields by their unique names, whatever section they are in."""
    for name, value in values.items():
        section = next(s for s in config.to_dict() if hasattr(getattr(config, s), name))
        setattr(getattr(config, section), name, value)


def errors_of(check, *args, **kwargs) -> list[str]:
    """The lines that a check refuses with."""
    with pytest.raises(ConfigError) as caught:
        check(*args, **kwargs)
    return str(caught.value).splitlines()


def data_config(**values: object) -> Config:
    """Of a run of 6 steps of 8 sequences of 16 tokens, but for these fields, which are set by name."""
    config = Config()
    change(config, **{"train_iters": 6, "global_batch_size": 8, "seq_length": 16, "eval_iters": 2, **values})
    return config
