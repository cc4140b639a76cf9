"""Teachers, students and batches of given sizes, for what is said about memory and the size of checkpoints."""

from dataclasses import dataclass
from pathlib import Path

import numpy
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_lrc.config import Config
from runs import make_config, on_layout
from tiny_data import write_dataset


@dataclass(frozen=True)
class Case:
    """A teacher's sizes, the student's (None: the teacher's), a batch and a layout."""

    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    layers: int
    vocab: int
    student: int
    sequence: int
    micro_batch: int
    num_microbatches: int = 1
    is_tied: bool = False
    bf16: bool = False
    tp: int = 1
    pp: int = 1
    dp: int = 1
    student_layers: int | None = None
    student_kv_heads: int | None = None
    student_ffn: int | None = None

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp


def write_teacher(case: Case, folder: Path) -> str:
    config = LlamaConfig(
        hidden_size=case.hidden,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=64,
        intermediate_size=case.ffn,
        num_hidden_layers=case.layers,
        vocab_size=case.vocab,
        tie_word_embeddings=case.is_tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def memory_config(case: Case, folder: Path) -> Config:
    """Of two steps on the case's ranks, with a teacher and data that are written into the folder."""
    folder.mkdir()
    tokens = numpy.random.default_rng(0).integers(0, case.vocab, size=40 * case.sequence).tolist()
    data = write_dataset(folder / "data", [tokens], dtype=numpy.int32)
    config = make_config(write_teacher(case, folder / "teacher"), data, folder / "run", steps=2)
    config.model.student_hidden_size, config.model.student_num_layers = case.student, case.student_layers
    config.model.student_num_query_groups = case.student_kv_heads
    config.model.student_ffn_hidden_size = case.student_ffn
    config.projection.calibration_tokens = case.sequence  # if there is any
    config.training.seq_length, config.training.micro_batch_size = case.sequence, case.micro_batch
    config.training.global_batch_size = case.micro_batch * case.num_microbatches * case.dp
    config.training.bf16 = case.bf16
    config.checkpoint.save, config.logging.eval_iters, config.data.split = None, 0, "1,0,0"
    return on_layout(config, tp=case.tp, pp=case.pp, dist_opt=case.dp > 1).resolved(case.ranks)
