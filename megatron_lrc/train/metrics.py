"""What a run reports: one JSON object per logged step, the boards, a console line. Only the main rank writes.

    RUN/metrics.jsonl       step, tokens, loss, lm_loss, kl_loss, clone_loss, teacher_lm_loss, clone_by_layer,
                            skipped_steps, grad_norm, grad_norm_by_group, lr, mask_sizes, and what was measured: time,
                            step_seconds, tokens_per_second, tflops, mfu, memory_gib, straggler
    RUN/validation.jsonl    step, tokens, loss, lm_loss, kl_loss, clone_loss, teacher_lm_loss on the held-out split,
                            teacher_kl, top1_agreement, effective_rank with --log-effective-rank, and a warning
                            where the student has become worse than at the first validation (`rises.py`)
    RUN/tensorboard/        the same numbers, lists over layers as one (`boards.py`)
    RUN/starts.jsonl        a line per start of the run (`starts.py`)
    RUN/config.yaml         all settings

Where they cannot be written for a while, they are later (`log_files.py`).

Losses are means over all tokens since the record before (or of the whole validation), without steps whose losses were
not finite. `loss` is the sum that is minimised, `kl_loss` has tau^2 in it and is of the kind that --kl-divergence
names, `clone_loss` is the sum over layers and terms, before alpha, and `clone_by_layer` its parts: term -> one value
per layer, whatever its pipeline stage. `kl_top_k_mass`, with --kl-top-k: the probability that the teacher gives to its
top k at temperature tau.
`teacher_lm_loss` is the teacher's LM loss on the same tokens, `teacher_kl` KL(teacher || student) at temperature 1 in
nats per token, `top1_agreement` the share of tokens after which both hold the same one likeliest. `skipped_steps`
counts the steps since the record before that updated nothing. `grad_norm` is the record's own step's, before clipping,
and `grad_norm_by_group` its parts: the projections of each kind of matrix over all layers (a tied one counts as embed),
and the norm gains. `effective_rank`: teacher, student -> the effective rank of the hidden states at each layer's input
and, last, at the final norm's.
`mask_sizes`, while --method sheared learns masks: hidden, groups, neurons -> how many the masks keep on average, after
the step. What is not finite, or off, is null.

`step_seconds` is the mean since the record before, without validations and saving. `tflops` is per second and device,
`mfu` its share of the device's peak, where that is known; both in total and by part (`throughput.py`). `memory_gib`:
peak since the start and now, each of the rank with the most (`process_memory.py`). `straggler`: with --log-straggler
the slowest rank (`stragglers.py`). `time` is UTC.
"""

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

from megatron_lrc.config import Config, save_yaml
from megatron_lrc.console import say
from megatron_lrc.train.boards import TensorBoard, WeightsAndBiases, scalars
from megatron_lrc.train.checkpoint_checks import CONFIG_FILE
from megatron_lrc.train.jsonl import drop_records_after, read_records
from megatron_lrc.train.log_files import LogFiles
from megatron_lrc.train.progress import Progress, agreement_text, losses_text
from megatron_lrc.train.rises import Rises
from megatron_lrc.train.starts import STARTS_FILE, lost_work, now, start_record
from megatron_lrc.train.throughput import Throughput

#: Records' losses, the sum first.
LOSSES = ("loss", "lm_loss", "kl_loss", "clone_loss", "teacher_lm_loss")


def last_validation(run: Path, step: int) -> dict[str, float]:
    """The losses of the last validation at or before `step`; empty where the run has none that can be read."""
    try:
        records = [record for record in read_records(run / "validation.jsonl") if record["step"] <= step]
    except OSError:
        return {}
    found = records[-1] if records else {}
    return {name: found[name] for name in LOSSES if isinstance(found.get(name), float)}


class RunLog:
    """Writes the records of one run; drops what an earlier process logged past `resume_at`, where this one goes on.

    checkpoint: what the run was loaded from; weights: fingerprint of those it read; both for starts.jsonl.
    """

    def __init__(
        self,
        config: Config,
        throughput: Throughput,
        *,
        resume_at: int,
        checkpoint: Path | None,
        weights: str | None,
        world_size: int,
    ):
        self._progress = Progress(config.train_iters)
        self.throughput = throughput
        save = config.checkpoint.save
        self._run = Path(save) if save else None
        self._files = LogFiles()
        # A run without a step validates when it starts, and so once more when it starts again.
        resume_after = {"metrics.jsonl": resume_at, "validation.jsonl": resume_at or -1}
        validations = []
        if self._run:
            lost = lost_work(read_records(self._run / "metrics.jsonl"), resume_at)
            for name, step in resume_after.items():
                path = self._run / name
                self._files.do(path, partial(drop_records_after, path, step))
            start = start_record(
                config, step=resume_at, checkpoint=checkpoint, weights=weights, world_size=world_size, lost=lost
            )
            self._append(STARTS_FILE, start)
            path = self._run / CONFIG_FILE
            self._files.do(path, partial(save_yaml, config, path))
            validations = read_records(self._run / "validation.jsonl")
        before = (record for record in validations if record["step"] <= resume_after["validation.jsonl"])
        self._rises = Rises(config, before)
        self._with_layers = config.logging.log_layers_to_tensorboard
        self._tensorboard = TensorBoard(self._run, self._files, resume_at=resume_at) if self._run else None
        self._wandb = WeightsAndBiases(config, self._run) if config.logging.wandb_project else None

    def step(self, record: dict[str, Any]) -> None:
        """Write a training record. It has `step_seconds`; what follows from them is added."""
        record = {**record, **self.throughput.record(record["step_seconds"]), "time": now()}
        self._write("metrics.jsonl", "train", record)
        for line in self._progress.lines(record):
            say(line)

    def validation(self, record: dict[str, Any]) -> None:
        warning = self._rises.look_at(record)
        self._write("validation.jsonl", "valid", {**record, **({"warning": warning} if warning else {})})
        say(f"validation at step {record['step']} | {losses_text(record)}{agreement_text(record)}")
        if warning:
            say(f"warning: {warning}")

    def close(self) -> None:
        self._files.close()
        if self._wandb:
            self._wandb.close()

    def _write(self, name: str, tag: str, record: dict[str, Any]) -> None:
        self._append(name, record)
        for board in filter(None, (self._tensorboard, self._wandb)):
            board.add(scalars(tag, record, with_layers=self._with_layers), record["step"])

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if self._run:
            line = json.dumps(_without_nan(record), allow_nan=False) + "\n"
            self._files.append(self._run / name, line.encode())


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
