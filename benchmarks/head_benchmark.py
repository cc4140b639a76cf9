"""`benchmark.py head`: the LM and KL losses and their gradients, ours against the materialised form.

The materialised form is what one writes first: both models' full logits in fp32, two softmaxes, autograd. Both get the
same hidden states and heads, take turns, and have to agree in loss and gradients. Extra memory is the peak above what
was there before, inputs included.
"""

import argparse
import ctypes
import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Spread, table
from megatron_lrc.clone.vocab_parallel import HeadLossSettings, lm_and_kl_loss
from megatron_lrc.clone.vocabulary_shard import VocabularyShard
from megatron_lrc.config import ConfigError
from megatron_lrc.train.process_memory import memory_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEMPERATURE = 40.0
#: Matrices of tokens x vocabulary in fp32 that the materialised form has at once, backward included: about.
_COPIES = 7


@dataclass(frozen=True)
class Inputs:
    """student [n, d], teacher [n, D], heads [V, d] and [V, D], labels [n]. The student's have gradients."""

    student: Tensor
    teacher: Tensor
    student_head: Tensor
    teacher_head: Tensor
    labels: Tensor

    @classmethod
    def random(cls, arguments: argparse.Namespace, device: torch.device) -> "Inputs":
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device) * scale
            return values.to(DTYPES[arguments.dtype])

        d, wide, vocab, tokens = (
            getattr(arguments, name) for name in ("student_hidden_size", "teacher_hidden_size", "vocab_size", "tokens")
        )
        return cls(
            draw(tokens, d, scale=1.0).requires_grad_(),
            draw(tokens, wide, scale=1.0),
            draw(vocab, d, scale=2 * d**-0.5).requires_grad_(),
            draw(vocab, wide, scale=2 * wide**-0.5),
            torch.randint(vocab, (tokens,), generator=generator, device=device),
        )


def ours(inputs: Inputs, chunk_tokens: int) -> Tensor:
    loss, _ = lm_and_kl_loss(
        inputs.student,
        inputs.teacher,
        inputs.student_head,
        inputs.teacher_head,
        inputs.labels,
        torch.ones(len(inputs.labels), device=inputs.labels.device),
        shard=VocabularyShard.of(len(inputs.student_head), len(inputs.student_head), None),
        settings=HeadLossSettings(lm=1.0, kl=1.0, temperature=TEMPERATURE, chunk_tokens=chunk_tokens),
    )
    return loss


def materialised(inputs: Inputs, chunk_tokens: int) -> Tensor:
    student = (inputs.student @ inputs.student_head.t()).float()
    with torch.no_grad():
        teacher = F.softmax((inputs.teacher @ inputs.teacher_head.t()).float() / TEMPERATURE, dim=-1)
    lm = F.cross_entropy(student, inputs.labels, reduction="sum")
    kl = F.kl_div(F.log_softmax(student / TEMPERATURE, dim=-1), teacher, reduction="sum")
    return lm + TEMPERATURE**2 * kl


@dataclass
class Contestant:
    name: str
    loss: Callable[[Inputs, int], Tensor]
    seconds: list[float] = field(default_factory=list)
    extra_bytes: list[int] = field(default_factory=list)
    last_loss: float = 0.0
    gradients: tuple[Tensor, ...] = ()

    def run(self, inputs: Inputs, chunk_tokens: int) -> None:
        """One forward and backward."""
        inputs.student.grad = inputs.student_head.grad = None
        self.gradients = ()
        gc.collect()
        before = _start_memory(inputs.labels.device)
        start = time.perf_counter()
        loss = self.loss(inputs, chunk_tokens)
        loss.backward()
        self.last_loss = loss.item()  # waits for the device
        self.seconds.append(time.perf_counter() - start)
        peak, _ = memory_bytes(inputs.labels.device)
        self.extra_bytes.append(peak - before)
        assert inputs.student.grad is not None and inputs.student_head.grad is not None
        self.gradients = (inputs.student.grad, inputs.student_head.grad)


def _start_memory(device: torch.device) -> int:
    """Forget the peak, and what the allocator keeps for later. What is in use now, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    _, now = memory_bytes(device)
    return now


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="tokens (default: 8192)")
    parser.add_argument("--vocab-size", type=int, default=128256, metavar="N", help="vocabulary (default: 128256)")
    parser.add_argument("--student-hidden-size", type=int, default=1536, metavar="N", help="default: 1536")
    parser.add_argument("--teacher-hidden-size", type=int, default=3072, metavar="N", help="default: 3072")
    parser.add_argument(
        "--loss-chunk-tokens", type=int, default=512, metavar="N", help="as in a training (default: 512)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of hidden states and heads")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="also write every figure here")


def run(arguments: argparse.Namespace, report: Callable[[str], None]) -> int:
    """0, or 1 where the two do not agree."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _check_room(arguments, device)
    inputs = Inputs.random(arguments, device)
    baseline, chunked = Contestant("full logits, autograd", materialised), Contestant("megatron_lrc, in chunks", ours)
    for number in range(arguments.repeats):
        for contestant in (baseline, chunked):
            contestant.run(inputs, arguments.loss_chunk_tokens)
        report(f"round {number + 1} of {arguments.repeats}")
    difference = _difference(baseline, chunked)
    for line in summary(baseline, chunked, arguments, device, difference):
        report(line)
    if arguments.json:
        figures = {
            each.name: {"seconds": each.seconds, "extra_bytes": each.extra_bytes} for each in (baseline, chunked)
        }
        content = {
            "arguments": vars(arguments),
            "cores": os.cpu_count(),
            "device": device.type,
            "difference": difference,
        }
        Path(arguments.json).write_text(
            json.dumps(content | {"contestants": figures}, indent=2) + "\n", encoding="utf-8"
        )
    return 0 if difference < (1e-4 if arguments.dtype == "float32" else 2e-2) else 1


def _check_room(arguments: argparse.Namespace, device: torch.device) -> None:
    sizes = ("tokens", "vocab_size", "student_hidden_size", "teacher_hidden_size", "loss_chunk_tokens", "repeats")
    for name in sizes:
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected is a number from 1.")
    needed = _COPIES * 4 * arguments.tokens * arguments.vocab_size
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"Full logits of {arguments.tokens} tokens take about {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are "
            "free. Use fewer --tokens: their memory grows with them, that of the chunks does not."
        )


def _difference(first: Contestant, second: Contestant) -> float:
    """The largest relative difference of loss and gradients (by norm)."""
    pairs = zip(first.gradients, second.gradients, strict=True)
    of_gradients = [((a.float() - b.float()).norm() / a.float().norm()).item() for a, b in pairs]
    return max(abs(first.last_loss / second.last_loss - 1), *of_gradients)


def summary(
    baseline: Contestant,
    chunked: Contestant,
    arguments: argparse.Namespace,
    device: torch.device,
    difference: float,
) -> list[str]:
    rows = [["median (min-max)", "seconds", "ratio", "extra MB", "ratio"]]
    for each in (baseline, chunked):
        times = [own / other for own, other in zip(each.seconds, baseline.seconds, strict=True)]
        sizes = [own / other for own, other in zip(each.extra_bytes, baseline.extra_bytes, strict=True)]
        extra = Spread.of([size / 1e6 for size in each.extra_bytes]).text(0)
        rows.append(
            [each.name, Spread.of(each.seconds).text(3), Spread.of(times).text(3), extra, Spread.of(sizes).text(3)]
        )
    return [
        "",
        f"{arguments.tokens} tokens x {arguments.vocab_size} vocabulary, {arguments.dtype}, on {device.type}; largest "
        f"relative difference of loss and gradients {difference:.1e}",
        *table(rows),
    ]
