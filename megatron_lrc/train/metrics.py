"""What a run reports: one JSON object per logged step, TensorBoard, a console line. Only the main rank writes.

    RUN/metrics.jsonl       step, tokens, loss, lm_loss, kl_loss, clone_loss, teacher_lm_loss, clone_by_layer,
                            skipped_steps, grad_norm, grad_norm_by_group, lr, tokens_per_second, step_seconds
    RUN/validation.jsonl    step, tokens, loss, lm_loss, kl_loss, clone_loss, teacher_lm_loss on the held-out split,
                            and effective_rank with --log-effective-rank
    RUN/tensorboard/        the same, as train/... and valid/...; what has parts as train_grad_norm/GROUP,
                            train_clone_TERM/layer_00, valid_effective_rank_MODEL/layer_00, ...

Losses are means over all tokens since the record before (or of the whole validation), without steps whose losses were
not finite. `loss` is the sum that is minimised, `kl_loss` has tau^2 in it, `clone_loss` is the sum over layers and
terms, before alpha, and `clone_by_layer` its parts: term -> one value per layer, whatever its pipeline stage.
`teacher_lm_loss` is the teacher's LM loss on the same tokens. `skipped_steps` counts the steps since the record before
that updated nothing. `grad_norm` is the record's own step's, before clipping, and `grad_norm_by_group` its parts: the
projections of each kind of matrix over all layers (a tied one counts as embed), and the norm gains. `effective_rank`:
teacher, student -> the effective rank of the hidden states at each layer's input and, last, at the final norm's. What
is not finite, or off, is null.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

#: Parts of a record that are lists over layers, and their name in TensorBoard.
LAYERED = {"clone_by_layer": "clone", "effective_rank": "effective_rank"}


#: Records' losses, the sum first.
LOSSES = ("loss", "lm_loss", "kl_loss", "clone_loss", "teacher_lm_loss")


def last_validation(run: Path, step: int) -> dict[str, float]:
    """The losses of the last validation at or before `step`; empty where the run has none that can be read."""
    try:
        lines = (run / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        records = [record for record in map(json.loads, lines) if record["step"] <= step]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    found = records[-1] if records else {}
    return {name: found[name] for name in LOSSES if isinstance(found.get(name), float)}


class RunLog:
    """Writes the records of one run; drops what an earlier process logged past `resume_at`, where this one goes on."""

    def __init__(self, run: str | None, *, train_iters: int, resume_at: int):
        self._train_iters = train_iters
        self._run = Path(run) if run else None
        self._board: Any = None
        if self._run:
            self._run.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "validation.jsonl"):
                _drop_records_after(self._run / name, resume_at)
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and wanted by one rank only

            self._board = SummaryWriter(str(self._run / "tensorboard"), purge_step=resume_at + 1 if resume_at else None)

    def step(self, record: dict[str, Any]) -> None:
        self._write("metrics.jsonl", "train", record)
        remaining = (self._train_iters - record["step"]) * record["step_seconds"]
        print(
            f"step {record['step']:>{len(str(self._train_iters))}}/{self._train_iters} | "
            f"{_count(record['tokens'])} tokens | {_losses(record)} | grad {record['grad_norm']:.3g} | "
            f"lr {record['lr']:.2e} | {_count(record['tokens_per_second'])} tokens/s | "
            f"{record['step_seconds']:.2f} s/step | ETA {_duration(remaining)}",
            flush=True,
        )

    def validation(self, record: dict[str, Any]) -> None:
        self._write("validation.jsonl", "valid", record)
        print(f"validation at step {record['step']} | {_losses(record)}", flush=True)

    def close(self) -> None:
        if self._board:
            self._board.close()

    def _write(self, name: str, tag: str, record: dict[str, Any]) -> None:
        if not self._run:
            return
        with open(self._run / name, "a") as file:
            file.write(json.dumps(_without_nan(record), allow_nan=False) + "\n")
        for name, value in scalars(tag, record).items():
            self._board.add_scalar(name, value, record["step"])
        self._board.flush()


def scalars(tag: str, record: dict[str, Any]) -> dict[str, float]:
    """TensorBoard's name -> value of everything in a record but its step and what is off (None)."""
    found: dict[str, float | None] = {}
    for key, value in record.items():
        if key == "grad_norm_by_group":
            found |= {f"{tag}_grad_norm/{group}": norm for group, norm in value.items()}
        elif key in LAYERED:
            for part, layers in value.items():
                prefix = f"{tag}_{LAYERED[key]}_{part}"
                found |= {f"{prefix}/layer_{layer:02d}": item for layer, item in enumerate(layers)}
        elif key != "step":
            found[f"{tag}/{key}"] = value
    return {name: value for name, value in found.items() if value is not None}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Stopwatch:
    """Seconds per step since the last lap, without what happens between `pause` and `resume` (validation, saving)."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start, self._paused_at = time.perf_counter(), 0.0

    def pause(self) -> None:
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        self._start += time.perf_counter() - self._paused_at

    def lap(self, steps: int) -> float:
        seconds = (time.perf_counter() - self._start) / steps
        self.restart()
        return seconds


def _drop_records_after(path: Path, step: int) -> None:
    """Keep the records up to `step`. Replaces the file whole, so that a crash loses nothing."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a crash


def _losses(record: dict[str, Any]) -> str:
    names = ("loss", "lm_loss", "kl_loss", "clone_loss")
    return " ".join(f"{name.removesuffix('_loss')} {record[name]:.4f}" for name in names)


def _count(number: float) -> str:
    for unit in ("", "K", "M", "B"):
        if number < 1000 or unit == "B":
            break
        number /= 1000
    return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
