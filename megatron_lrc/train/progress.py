"""The console's lines for a run's records, about 110 columns at most.

A line has what changes from record to record. What hardly does (the share of the peak, memory) is said once, and
metrics.jsonl has everything in full precision.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

LOSS_TERMS = ("loss", "lm_loss", "kl_loss", "clone_loss")


class Progress:
    """Makes the lines, and from them on knows how long a step takes with all that lies between steps."""

    def __init__(self, train_iters: int):
        self._train_iters = train_iters
        self._first: tuple[int, float] | None = None  # step and clock of this process's first line
        self._num_lines = 0

    def lines(self, record: dict[str, Any]) -> Iterator[str]:
        """The record's line; with the second one, when all is warm, or the last, also what will hardly change."""
        self._num_lines += 1
        yield self.line(record)
        is_last = record["step"] == self._train_iters
        if self._num_lines == 2 or (self._num_lines == 1 and is_last):
            yield steady_text(record)

    def line(self, record: dict[str, Any]) -> str:
        step, steps = record["step"], self._train_iters
        return (
            f"step {step:>{len(str(steps))}}/{steps} | {losses_text(record)} | grad {record['grad_norm']:.3g} | "
            f"{count(record['tokens_per_second'])} tok/s | ETA {duration(self._seconds_left(record))}"
        )

    def _seconds_left(self, record: dict[str, Any]) -> float:
        """By the pace since this process's first line, validations and saving included."""
        step, clock, pace = record["step"], time.monotonic(), record["step_seconds"]
        if self._first is None:
            self._first = step, clock
        elif step > self._first[0]:
            pace = (clock - self._first[1]) / (step - self._first[0])
        return (self._train_iters - step) * pace


def losses_text(record: dict[str, Any]) -> str:
    """`loss` and its terms, each in about five characters; beside the LM loss the teacher's on the same tokens."""
    if math.isnan(record["loss"]):
        return "no loss: all labels are masked, or no loss was finite"
    terms = {name.removesuffix("_loss"): _loss(record[name]) for name in LOSS_TERMS if name in record}
    if record.get("teacher_lm_loss") is not None:
        terms["lm"] += f" (teacher {_loss(record['teacher_lm_loss'])})"
    if "kl_top_k_mass" in record:
        terms["kl"] += f" (of {record['kl_top_k_mass']:.1%})"
    return " ".join(f"{name} {text}" for name, text in terms.items())


def steady_text(record: dict[str, Any]) -> str:
    """What hardly changes during a run: the device's use, memory."""
    share = f"MFU {record['mfu']['total']:.0%}, " if "mfu" in record else ""
    return (
        f"at {count(record['tokens_per_second'])} tok/s: {share}{record['tflops']['total']:.3g} TFLOP/s per device; "
        f"peak memory {record['memory_gib']['peak']:.3g} GiB"
    )


def agreement_text(record: dict[str, Any]) -> str:
    """Of a validation with a teacher: KL from the teacher, and how often both hold the same token likeliest."""
    if math.isnan(record.get("teacher_kl", math.nan)):
        return ""
    return f" | of the teacher: KL {_loss(record['teacher_kl'])} top-1 {record['top1_agreement']:.1%}"


def gap_text(first: float, last: float, teacher: float) -> str:
    """How much of the gap between the first validation's LM loss and the teacher's is closed; "" for want of a figure.

    Words where a share says nothing: the teacher has no lead to close, or the last loss is not between the two.
    """
    if not all(map(math.isfinite, (first, last, teacher))):
        return ""
    if last <= teacher:
        return f"not above the teacher's {_loss(teacher)}"
    if first <= teacher:
        return f"above the teacher's {_loss(teacher)}, and at first it was not"
    if last > first:
        return f"above the {_loss(first)} it began with; the teacher's is {_loss(teacher)}"
    return f"{(first - last) / (first - teacher):.0%} of the way to the teacher's {_loss(teacher)}"


def _loss(value: float) -> str:
    if 0.1 <= abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:,.4g}"


def count(number: float) -> str:
    """Three digits and a unit: 30.7K."""
    for unit in ("", "K", "M", "B"):
        if number < 999.5 or unit == "B":
            break
        number /= 1000
    return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"


def duration(seconds: float) -> str:
    """9m05s, 3h02m, 5d03h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
