"""kept.safetensors of an exported student: what it has of its teacher, where that is not all.

`layers` [L']: the teacher's layers that its own are made of. `layers.{i}.groups`, `layers.{i}.neurons`: the KV groups
and FFN neurons of that teacher's layer that the student's layer i keeps. All int64, rising, counted from 0. Whoever
compares the two models part by part needs it; whoever loads the student does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_lrc.clone.kept_rows import UNITS, KeptRows
from megatron_lrc.config import ConfigError, ModelShape

KEPT_FILE = "kept.safetensors"


@dataclass(frozen=True, slots=True)
class Kept:
    """layers: () stands for all of the teacher's. rows: by the student's layer; {} for all rows."""

    layers: tuple[int, ...] = ()
    rows: Mapping[int, KeptRows] = field(default_factory=dict)


def write_kept(folder: Path, shape: ModelShape, rows: Mapping[int, KeptRows]) -> None:
    """No file of a student that has all of its teacher's layers, groups and neurons."""
    tensors = {f"layers.{layer}.{unit}": kept.of(unit) for layer, kept in rows.items() for unit in UNITS}
    if shape.teacher_layers:
        tensors["layers"] = torch.tensor(shape.teacher_layers)
    if tensors:
        save_file(tensors, folder / KEPT_FILE)


def read_kept(folder: Path) -> Kept:
    """Of an exported student; ConfigError where the file is damaged."""
    path = folder / KEPT_FILE
    if not path.is_file():
        return Kept()
    try:
        tensors = load_file(path)
        rows = {
            int(name.split(".")[1]): KeptRows(*(tensors[name.replace(UNITS[0], unit)] for unit in UNITS))
            for name in tensors
            if name.endswith(UNITS[0])
        }
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}). Export the student again.") from None
    return Kept(tuple(tensors.get("layers", torch.empty(0, dtype=torch.int64)).tolist()), rows)
