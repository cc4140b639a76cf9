"""Where records are shown besides metrics.jsonl: TensorBoard, always; Weights & Biases, if --wandb-project is given.

Both get the same names: train/... and valid/...; what has parts as train_grad_norm/GROUP, train_clone/TERM, ... What is
a list over layers is shown as one number, and with --log-layers-to-tensorboard layer by layer too: these are most of
all numbers (clone losses of seven matrices in each layer), so they have a group of their own, train_layers/clone_q_00.

The W&B run goes on after a resume: its id is kept in RUN/wandb_run_id. Its x axis is `step`, and steps that were lost
and done again are there twice. A W&B that fails costs a warning, not the run: every record is in metrics.jsonl.
"""

import io
import socket
import statistics
import time
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_lrc.config import Config, ConfigError
from megatron_lrc.console import say
from megatron_lrc.train.log_files import LogFiles
from megatron_lrc.whole_files import write_whole

#: Parts of a record that are lists over layers: their name on the boards, and what makes one number of a list.
LAYERED = {"clone_by_layer": ("clone", sum), "effective_rank": ("effective_rank", statistics.fmean)}
WANDB_ID_FILE = "wandb_run_id"


def check_boards(config: Config) -> None:
    """Refuse --wandb-project where wandb is not installed."""
    logging = config.logging
    if logging.wandb_project is not None and find_spec("wandb") is None:
        raise ConfigError(
            f"--wandb-project {logging.wandb_project} needs the package wandb, which is not installed. Run pip install "
            "'megatron-lrc[watch]', or leave the flag out: TensorBoard and tools/report.py show the same."
        )
    if logging.wandb_exp_name is not None and logging.wandb_project is None:
        raise ConfigError(
            f"--wandb-exp-name {logging.wandb_exp_name} names a run of no project. Give --wandb-project too."
        )


def scalars(tag: str, record: dict[str, Any], *, with_layers: bool = False) -> dict[str, float]:
    """A board's name -> value of every number in a record but its step; what is off (None) is left out."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if key in LAYERED:
            found |= _of_layers(tag, key, value, with_layers=with_layers)
        elif isinstance(value, dict):
            name = key.removesuffix("_by_group")
            found |= {f"{tag}_{name}/{part}": item for part, item in value.items()}
        elif key != "step":
            found[f"{tag}/{key}"] = value
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def _of_layers(
    tag: str, key: str, parts: dict[str, list[float | None]], *, with_layers: bool
) -> dict[str, float | None]:
    """parts: name -> a value for each layer, None where it is off."""
    name, summarize = LAYERED[key]
    found: dict[str, float | None] = {}
    for part, layers in parts.items():
        if values := [value for value in layers if value is not None]:
            found[f"{tag}_{name}/{part}"] = summarize(values)
        if with_layers:
            found |= {f"{tag}_layers/{name}_{part}_{layer:02d}": value for layer, value in enumerate(layers)}
    return found


class TensorBoard:
    """Shows numbers by step in RUN/tensorboard; what was shown past `resume_at` is hidden.

    Rejected: torch's SummaryWriter. Its thread dies of a full disk, with half a record in the file, behind which
    TensorBoard reads nothing.
    """

    def __init__(self, run: Path, files: LogFiles, *, resume_at: int):
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{uuid.uuid4().hex[:8]}"
        self._path, self._files = run / "tensorboard" / name, files
        self._append(file_version="brain.Event:2")
        if resume_at:
            self._append(step=resume_at + 1, session_log={"status": "START"})

    def add(self, values: dict[str, float], step: int) -> None:
        shown = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._append(step=step, summary={"value": shown})

    def _append(self, **event: Any) -> None:
        # Slow to import, and wanted by one rank only.
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **event).SerializeToString())
        self._files.append(self._path, record.getvalue())


class WeightsAndBiases:
    """One W&B run over all starts of a training run."""

    def __init__(self, config: Config, run: Path | None):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run: Any = None
        try:
            self._run = wandb.init(
                project=config.logging.wandb_project,
                name=config.logging.wandb_exp_name or (run.absolute().name if run else None),
                id=_wandb_id(run),
                resume="allow",
                dir=str(run) if run else None,
                config=config.to_dict(),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # no login, no network: whatever it is, training does not depend on it
            self._give_up(error)

    def add(self, values: dict[str, float], step: int) -> None:
        if self._run is None:
            return
        try:
            self._run.log({**values, "step": step})
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _give_up(self, error: Exception) -> None:
        self._run = None
        say(
            f"warning: Weights & Biases is off from here on ({' '.join(str(error).split())}); the run goes on, and "
            "metrics.jsonl has every record. Run wandb login before the next start, or set WANDB_MODE=offline."
        )


def _wandb_id(run: Path | None) -> str:
    """The id that this training run has had before, or a new one, kept in the run directory."""
    if run is None:
        return uuid.uuid4().hex[:12]
    path = run / WANDB_ID_FILE
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
