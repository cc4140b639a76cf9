"""Configurations of tiny runs by other methods than a plain clone: ordinary, sheared, and opened clones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lrc.config import Config, LossConfig, ProjectionConfig
from runs import make_config

OPENED = CUT = 2  # steps, of 4: when matrices are opened, when the model is cut


def ordinary(config: Config, model: str) -> Config:
    """The same run, but that it trains this model by itself."""
    chosen = replace(config.model, method="ordinary", student=model, teacher=None, student_hidden_size=None)
    chosen.untie_embeddings_and_output_weights = None
    loss = LossConfig(loss_chunk_tokens=config.loss.loss_chunk_tokens)
    return replace(config, model=chosen, loss=loss, projection=ProjectionConfig())


def ordinary_config(model: str, data: str, run: Path, *, steps: int) -> Config:
    return ordinary(make_config("", data, run, steps=steps), model)


def sheared(config: Config, *, hidden: int = 28, groups: int | None = 1, neurons: int | None = 50) -> Config:
    """The same run by --method sheared, of the model in --teacher."""
    model = replace(config.model, method="sheared", student_hidden_size=hidden)
    pruning = replace(config.pruning, pruned_num_query_groups=groups, pruned_ffn_hidden_size=neurons)
    loss = LossConfig(loss_chunk_tokens=config.loss.loss_chunk_tokens)
    return replace(config, model=model, pruning=pruning, loss=loss, projection=ProjectionConfig())


def sheared_config(teacher: str, data: str, run: Path, *, steps: int = 4, **sizes: int | None) -> Config:
    """sizes: as `sheared`."""
    config = sheared(make_config(teacher, data, run, steps=steps), **sizes)
    config.pruning.prune_after = CUT
    config.optimizer.adam_eps = 1e-5  # gradients of rounding alone move nothing
    return config


def opened_config(teacher: str, data: str, run: Path, matrices: Any, *, steps: int = 4) -> Config:
    """matrices: as --open-matrices."""
    config = make_config(teacher, data, run, steps=steps)
    config.projection.open_after, config.projection.open_matrices = OPENED, matrices
    config.optimizer.adam_eps = 1e-5  # gradients of rounding alone move nothing
    return config
