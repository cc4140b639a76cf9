"""Small runs of the real command on a GPU or on the CPU, and their differences.

The model is small but of sizes that FP8 products can have (multiples of 128).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_teachers import _write

ROOT = Path(__file__).parents[2]
SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
}
COMMON = (
    "--student-hidden-size 128 --split 90,10,0 --seq-length 256 --micro-batch-size 4 --global-batch-size 8 "
    "--lr 1e-3 --lr-warmup-iters 0 --lr-decay-iters 400 --init-method-std 0.06 --log-interval 1 --eval-iters 0"
)


def write_teacher(folder: Path) -> str:
    _write(folder, LlamaForCausalLM, LlamaConfig(**SIZES), dtype=torch.float32)
    return str(folder)


def train(
    run: Path, teacher: str, data: str, steps: int, flags: str = "", *, on_cpu: bool = False, ranks: int = 1
) -> list[dict]:
    """The records of all training steps of `python -m megatron_lrc train`, in processes of their own."""
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node={ranks} " * (ranks > 1)
    run_flags = f"--teacher {teacher} --data-path {data} --save {run} --train-iters {steps} {COMMON}"
    command = f"{launcher}-m megatron_lrc train {run_flags}"
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
    process = subprocess.run(
        [sys.executable, *command.split(), *flags.split()],
        env={**os.environ, **hidden, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def difference(found: list[dict], expected: list[dict], keys: tuple[str, ...] = ("loss", "clone_loss")) -> float:
    """The largest relative difference of losses and of every group's gradient norm, over all steps."""
    assert len(found) == len(expected) > 0
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        pairs = [(one[key], other[key]) for key in keys]
        pairs += [(one["grad_norm_by_group"][name], value) for name, value in other["grad_norm_by_group"].items()]
        worst = max(worst, *(abs(a - b) / abs(b) for a, b in pairs if b))
    return worst


def last_loss(records: list[dict], steps: int = 20) -> float:
    """The mean over the last steps."""
    return sum(record["loss"] for record in records[-steps:]) / steps
