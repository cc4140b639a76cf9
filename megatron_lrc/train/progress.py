"""The console's line for a training record, about 140 columns at most. Full precision is in metrics.jsonl."""

import time
from typing import Any

LOSS_TERMS = ("loss", "lm_loss", "kl_loss", "clone_loss")


class Progress:
    """Makes the lines, and from them on knows how long a step takes with all that lies between steps."""

    def __init__(self, train_iters: int):
        self._train_iters = train_iters
        self._first: tuple[int, float] | None = None  # step and clock of this process's first line

    def line(self, record: dict[str, Any]) -> str:
        step, steps = record["step"], self._train_iters
        speed = f"{count(record['tokens_per_second'])} tok/s "
        if "mfu" in record:
            speed += f"MFU {100 * record['mfu']['total']:.0f}%"
        else:
            speed += f"{record['tflops']['total']:.3g} TFLOP/s"
        lr = f"{record['lr']:.1e}".replace("e-0", "e-")
        return (
            f"step {step:>{len(str(steps))}}/{steps} {100 * step / steps:.0f}% {count(record['tokens'])} tok | "
            f"{losses_text(record)} | grad {record['grad_norm']:.3g} lr {lr} | {speed} "
            f"{record['memory_gib']['peak']:.3g} GiB | ETA {duration(self._seconds_left(record))}"
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
    """`loss` and its terms, each in about five characters."""
    return " ".join(f"{name.removesuffix('_loss')} {_loss(record[name])}" for name in LOSS_TERMS if name in record)


def agreement_text(record: dict[str, Any]) -> str:
    """Of a validation with a teacher: KL from the teacher, and how often both hold the same token likeliest."""
    if "teacher_kl" not in record:
        return ""
    return f" | of the teacher: KL {_loss(record['teacher_kl'])} top-1 {record['top1_agreement']:.1%}"


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
