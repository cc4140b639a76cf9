"""RUN/starts.jsonl: a line for every time that a run was started, also after crashes.

    time             when, UTC
    step             where it goes on: 0, or its checkpoint's step
    train_iters      how far it is to go
    checkpoint       what it was loaded from; null for a new run
    weights          fingerprint of the teacher, or of the model that a new run of ordinary training begins with; null
                     where the checkpoint has all the weights, and for a model that begins at random
    lost_steps       steps of an earlier process that were logged past that point, and are done again
    lost_seconds     how long those steps had taken
    world_size, hosts, host (of rank 0), layout (tp, pp, cp, dp), versions (megatron_lrc, torch, megatron_core, python)

How the process before ended shows in the steps: without lost steps it saved before it went. Steps after its last record
are lost too, but nobody counted them.
"""

import os
import platform
import socket
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_lrc import __version__
from megatron_lrc.config import Config

STARTS_FILE = "starts.jsonl"


def now() -> str:
    """UTC, to the second, as in 2025-01-31T12:00:00+00:00."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def lost_work(records: Iterable[dict[str, Any]], resume_at: int) -> tuple[int, float]:
    """(steps, seconds) of the training records, in order, that lie past the step at which the run goes on."""
    steps, seconds, before = 0, 0.0, 0
    for record in records:
        if record["step"] > resume_at:
            since = record["step"] - max(before, resume_at)
            took = record.get("step_seconds")  # a record may be damaged, or of another version
            steps, seconds = steps + since, seconds + since * (took if isinstance(took, (int, float)) else 0.0)
        before = record["step"]
    return steps, seconds


def start_record(
    config: Config,
    *,
    step: int,
    checkpoint: Path | None,
    weights: str | None,
    world_size: int,
    lost: tuple[int, float],
) -> dict[str, Any]:
    """This start's line."""
    parallel = config.parallel
    return {
        "time": now(),
        "step": step,
        "train_iters": config.train_iters,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "weights": weights,
        "lost_steps": lost[0],
        "lost_seconds": lost[1],
        "world_size": world_size,
        "hosts": int(os.environ.get("GROUP_WORLD_SIZE", "1")),  # torchrun's name for its nodes
        "host": socket.gethostname(),
        "layout": {
            "tp": parallel.tensor_model_parallel_size,
            "pp": parallel.pipeline_model_parallel_size,
            "cp": parallel.context_parallel_size,
            "dp": config.data_parallel_size(world_size),
        },
        "versions": {
            "megatron_lrc": __version__,
            "torch": version_of("torch"),
            "megatron_core": version_of("megatron-core"),
            "python": platform.python_version(),
        },
    }


def version_of(package: str) -> str | None:
    """Of an installed package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:  # from a source tree
        return None
