"""Models to measure: a run of one process, as a training builds it, with random tokens for data."""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lrc.config import Config, ConfigError, ModelShape
from megatron_lrc.estimate.published_teachers import TEACHER_SHAPES
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import TeacherDescription, describe_teacher
from megatron_lrc.hf.reader import Reader
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.mcore.optimizer import build_optimizer, parameter_dtype
from megatron_lrc.methods import method_of
from megatron_lrc.methods.method import Materials
from megatron_lrc.methods.ordinary.initial_weights import InitialWeights
from megatron_lrc.train.step import Run


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, metavar="DIR", help="teacher, as in a training")
    add_size_flags(parser, seq_length=256)


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    """A teacher, or only its sizes: speed does not depend on what the weights are."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--teacher", metavar="DIR", help="teacher, as in a training")
    which.add_argument(
        "--shape", choices=TEACHER_SHAPES, metavar="NAME", help=f"random weights instead: {', '.join(TEACHER_SHAPES)}"
    )
    which.add_argument("--teacher-config", metavar="PATH", help="random weights for this config.json, or its directory")


def open_base(arguments: argparse.Namespace) -> tuple[TeacherDescription, Reader]:
    """The teacher of `add_teacher_flags`."""
    if arguments.teacher:
        description = describe_teacher(arguments.teacher)
        return description, open_teacher(description)
    if arguments.shape:
        description = _describe(_config_values(TEACHER_SHAPES[arguments.shape]), arguments.shape)
    elif Path(arguments.teacher_config).is_file():
        text = Path(arguments.teacher_config).read_text(encoding="utf-8")
        description = _describe(text, str(Path(arguments.teacher_config).absolute().parent))
    else:
        description = describe_teacher(arguments.teacher_config, needs_weights=False)
    return description, InitialWeights(description, description.shape, std=0.02, seed=0)


def _describe(config_json: str, name: str) -> TeacherDescription:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(config_json, encoding="utf-8")
        return replace(describe_teacher(folder, needs_weights=False), directory=Path(name))


def _config_values(shape: ModelShape) -> str:
    """A config.json of this shape. RoPE is the plain one: its frequencies change no speed."""
    is_qwen = shape.has_qkv_bias
    values: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM" if is_qwen else "LlamaForCausalLM"],
        "model_type": "qwen2" if is_qwen else "llama",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_hidden_size,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": shape.is_tied,
        "max_position_embeddings": shape.max_position_embeddings,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
    }
    return json.dumps(values)


def add_size_flags(parser: argparse.ArgumentParser, *, seq_length: int) -> None:
    add_student_flags(parser)
    parser.add_argument(
        "--seq-length", type=int, default=seq_length, metavar="N", help=f"tokens of a sequence (default: {seq_length})"
    )


def add_student_flags(parser: argparse.ArgumentParser) -> None:
    add_width_flags(parser)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds (default: 3)")


def add_width_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--student-hidden-size", required=True, type=int, metavar="N", help="as in a training")
    parser.add_argument("--bf16", action="store_true", help="as in a training (default: fp32)")


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """ConfigError unless these flags are numbers from 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected is a number from 1.")


def config_of(arguments: argparse.Namespace) -> Config:
    """The configuration of a run with these flags. ConfigError if they cannot be meant."""
    check_positive(arguments, "repeats", "seq_length", "student_hidden_size")
    config = Config()
    config.model.teacher, config.model.student_hidden_size = arguments.teacher, arguments.student_hidden_size
    config.training.seq_length, config.training.train_iters = arguments.seq_length, 1
    config.training.bf16 = arguments.bf16
    return config.resolved(1)


def build(config: Config) -> tuple[Run, Iterator[dict[str, Tensor]]]:
    """Models and optimizer of a run of one process, and an endless supply of one micro-batch."""
    description = describe_teacher(str(config.model.teacher))
    groups = distributed.start(config)
    batches = same_batch(config, description.shape.vocab_size, groups.device)
    return build_run(config, description, open_teacher(description), groups, batches), batches


def build_run(
    config: Config,
    base: TeacherDescription,
    reader: Reader,
    groups: Groups,
    batches: Iterator[dict[str, Tensor]],
    *,
    is_new: bool = True,
) -> Run:
    """base, reader: of the teacher, or with --method ordinary of the model to train. is_new: False where what is
    trained is to have no values yet."""
    dtype = parameter_dtype(config)
    method = method_of(config)
    stages = method.build_stages(Materials(base, reader, groups, dtype, lambda: batches, is_new))
    return Run(method, groups, stages, build_optimizer(config, stages, groups), config.num_microbatches(1))


def same_batch(config: Config, vocab_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """One micro-batch of random tokens, again and again."""
    size = (config.training.micro_batch_size, config.training.seq_length)
    ids = torch.randint(vocab_size, size, device=device)
    positions = torch.arange(size[1], device=device).expand(size)
    batch = {"tokens": ids, "labels": ids, "position_ids": positions, "loss_mask": torch.ones_like(ids).float()}
    while True:
        yield batch
