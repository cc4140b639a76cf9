"""The models under evaluation: Hugging Face directories, and run directories exported for the time of a `with` block.

A checkpoint goes through the code of tools/convert_to_hf.py, self-check included, so that what is evaluated is what a
user of the export gets.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_lrc.checkpoints.run_directory import STATE_FILE, checkpoints, find_changed, find_missing, read_state
from megatron_lrc.config import ConfigError
from megatron_lrc.hf.forward import load_pretrained
from megatron_lrc.verify.exporting import export_saved
from megatron_lrc.verify.weight_streams import open_student


@contextmanager
def as_hugging_face(path: Path, teacher: str | None, report: Callable[[str], None]) -> Iterator[Path]:
    """`path` itself, or the newest good checkpoint of the run there in a temporary Hugging Face directory.

    teacher: where the run's teacher is looked for when it is no longer where it was in the training.
    """
    if (path / "config.json").is_file():
        yield path
        return
    checkpoint = newest_good_checkpoint(path, report)
    base = read_state(checkpoint)[1].base_model
    moved = teacher if base is None or not Path(base).is_dir() else None
    student, description = open_student(str(checkpoint), moved)
    with tempfile.TemporaryDirectory(prefix="megatron_lrc_") as folder:
        output = Path(folder) / "model"
        report(f"{checkpoint}: exporting step {student.state.step} to a temporary directory")
        export_saved(student, description, output=output)
        yield output


def hugging_face_teacher(path: Path) -> Path:
    """The directory that --teacher names. ConfigError if it is none."""
    if not (path / "config.json").is_file():
        raise ConfigError(f"--teacher {path} has no config.json. A Hugging Face directory is expected.")
    return path


def newest_good_checkpoint(run: Path, report: Callable[[str], None]) -> Path:
    """The run's newest checkpoint that is whole, or `run` if it is one itself. Says which it passes over, and why."""
    found = [run] if (run / STATE_FILE).is_file() else checkpoints(run)
    for path in found:
        damage = find_missing(path) or find_changed(path)
        if damage is None:
            return path
        report(f"{path} is damaged ({damage}): passed over")
    if found:
        raise ConfigError(f"{run}: no checkpoint is whole. Give a copy of the run, or a model exported from it.")
    raise ConfigError(
        f"{run} holds no model. A Hugging Face directory (config.json and safetensors), a run directory, or one of its "
        "checkpoints (iter_NNNNNNN) is expected."
    )


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name} is no device. auto, cpu, cuda or cuda:N is expected.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices. Use --device auto.")
    return device


def load_model(directory: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The causal language model, for inference. ConfigError where transformers does not find exactly its tensors."""
    return load_pretrained(directory, dtype).to(device).requires_grad_(False)
