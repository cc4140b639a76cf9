"""Models to measure: a run of one process, as a training builds it, with random tokens for data."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config

from megatron_lrc.config import Config, ConfigError, ModelShape
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.optimizer import StageOptimizer, parameter_dtype
from megatron_lrc.train.build import build_stages, initialize
from megatron_lrc.train.step import Run


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, metavar="DIR", help="teacher, as in a training")
    parser.add_argument("--student-hidden-size", required=True, type=int, metavar="N", help="as in a training")
    parser.add_argument("--seq-length", type=int, default=256, metavar="N", help="tokens of a step (default: 256)")
    parser.add_argument("--bf16", action="store_true", help="as in a training (default: fp32)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds (default: 3)")


def config_of(arguments: argparse.Namespace) -> Config:
    """The configuration of a run with these flags. ConfigError if they cannot be meant."""
    for name in ("repeats", "seq_length", "student_hidden_size"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected is a number from 1.")
    config = Config()
    config.model.teacher, config.model.student_hidden_size = arguments.teacher, arguments.student_hidden_size
    config.training.seq_length, config.training.train_iters = arguments.seq_length, 1
    config.training.bf16 = arguments.bf16
    return config.resolved(1)


def build(config: Config) -> tuple[Run, Iterator[dict[str, Tensor]]]:
    """Models and optimizer of a run of one process, and an endless supply of one micro-batch of one sequence."""
    description = describe_teacher(str(config.model.teacher))
    groups = distributed.start(config)
    stages = build_stages(config, description, open_teacher(description), groups, parameter_dtype(config))

    def batches() -> Iterator[dict[str, Tensor]]:
        ids = torch.randint(description.shape.vocab_size, (1, config.training.seq_length), device=groups.device)
        positions = torch.arange(config.training.seq_length, device=groups.device)[None]
        while True:
            yield {"tokens": ids, "labels": ids, "position_ids": positions, "loss_mask": torch.ones_like(ids).float()}

    initialize(config, stages, batches, groups)
    return Run(config, groups, stages, StageOptimizer(config, stages, groups), 1), batches()


def write_config(shape: ModelShape, folder: Path) -> str:
    """A teacher directory without weights: config.json of a model of this shape, its RoPE without scaling."""
    kind = Qwen2Config if shape.has_qkv_bias else LlamaConfig
    config = kind(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        intermediate_size=shape.ffn_hidden_size,
        vocab_size=shape.vocab_size,
        rms_norm_eps=shape.norm_epsilon,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=shape.is_tied,
        architectures=[kind.__name__.replace("Config", "ForCausalLM")],
    )
    config.head_dim = shape.head_dim
    config.save_pretrained(folder)
    return str(folder)
