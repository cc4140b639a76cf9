"""A checkpoint's student, read in one process and without megatron-core: what exports and comparisons of models need.

What a checkpoint holds is said in `mcore/checkpoint.py`, which writes it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_lrc.checkpoints.boxes import read_box, take
from megatron_lrc.checkpoints.index import UnsafeCheckpoint, read_index
from megatron_lrc.checkpoints.layout import KEPT, NORMS, PROJECTIONS, Box, all_boxes, box_of, whole_box
from megatron_lrc.checkpoints.run_directory import (
    STATE_FILE,
    RunState,
    find_changed,
    find_missing,
    newest_checkpoint,
    read_state,
)
from megatron_lrc.clone.kept_rows import UNITS, KeptRows
from megatron_lrc.clone.sites import HeadLayout
from megatron_lrc.config import Config, ConfigError, ModelShape


class _Tensors(Mapping[str, Tensor]):
    """Tensors of a checkpoint, each read when it is asked for. boxes: in which the tensor of a name lies."""

    def __init__(self, files: FileSystemReader, index: Metadata, boxes: Mapping[str, Box], heads: HeadLayout):
        self._files, self._stored, self._boxes, self._heads = files, index.state_dict_metadata, boxes, heads

    def __getitem__(self, name: str) -> Tensor:
        box = self._boxes[name]
        stored = self._stored[box.key]
        assert isinstance(stored, TensorStorageMetadata)
        return take(name.rpartition(".")[2], read_box(self._files, stored, box), box, self._heads)

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self._boxes

    def __iter__(self) -> Iterator[str]:
        return iter(self._boxes)

    def __len__(self) -> int:
        return len(self._boxes)


def _boxes_under(prefix: str, index: Metadata) -> dict[str, Box]:
    """By name, without the prefix: whole tensors that are no part of a GPTModel."""
    return {
        key.removeprefix(prefix): whole_box(key, tuple(stored.size))
        for key, stored in index.state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }


def _boxes_of_weights(shape: ModelShape, index: Metadata) -> dict[str, Box]:
    """By `Weight.key`: the student's own weights."""
    return {
        name if box.layer is None else f"layers.{box.layer}.{name}": box_of(shape, name, box.layer)
        for box in all_boxes(shape)
        if box.key in index.state_dict_metadata
        for name in box.names
    }


@dataclass(frozen=True, slots=True)
class SavedStudent:
    """A checkpoint, open for reading in one process, on CPU.

    weights: those that are its own and not composed: all of them of ordinary training, whose projections and norms are
    empty. Projections of what is its own may be there too; they have made targets of the clone loss. kept: by its
    layers, what a slimmer student has of its teacher's.
    """

    path: Path
    config: Config
    shape: ModelShape
    state: RunState
    projections: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    kept: Mapping[int, KeptRows]

    @property
    def is_composed(self) -> bool:
        """Whether all of its matrices are made of projections."""
        return not self.weights

    @property
    def dtype(self) -> torch.dtype:
        """Of what was trained."""
        return (self.norms or self.weights)["final"].dtype


def open_checkpoint(run: str) -> SavedStudent:
    """The newest checkpoint of a run directory, or the one that `run` itself is. ConfigError if it is damaged."""
    path = Path(run) if (Path(run) / STATE_FILE).is_file() else newest_checkpoint(run)
    if path is None:
        raise ConfigError(
            f"--load {run} holds no checkpoint (iter_NNNNNNN/{STATE_FILE}). Give a run directory, as --save wrote it."
        )
    state, config, shape = read_state(path)
    if damage := find_missing(path) or find_changed(path):
        raise ConfigError(f"{path} is damaged ({damage}). Use an older checkpoint of the run.")
    files, index = _open_files(path)
    kept = _read_kept(files, index, HeadLayout.of(shape))
    kinds = _boxes_under(PROJECTIONS, index), _boxes_under(NORMS, index), _boxes_of_weights(shape, index)
    projections, norms, weights = (_Tensors(files, index, boxes, HeadLayout.of(shape)) for boxes in kinds)
    return SavedStudent(path, config, shape, state, projections=projections, norms=norms, weights=weights, kept=kept)


def read_kept_rows(checkpoint: Path, shape: ModelShape) -> dict[int, KeptRows]:
    """By the layers of a slimmer student, what it has of its teacher's; {} of any other one. shape: the student's."""
    return _read_kept(*_open_files(checkpoint), HeadLayout.of(shape))


def _open_files(checkpoint: Path) -> tuple[FileSystemReader, Metadata]:
    try:
        index = read_index(checkpoint)
    except UnsafeCheckpoint as error:
        raise ConfigError(f"{error}. Give a checkpoint that megatron_lrc wrote.") from None
    files = FileSystemReader(checkpoint)
    files.set_up_storage_reader(index, is_coordinator=True)
    return files, index


def _read_kept(files: FileSystemReader, index: Metadata, heads: HeadLayout) -> dict[int, KeptRows]:
    tensors = _Tensors(files, index, _boxes_under(KEPT, index), heads)
    layers = {int(name.split(".")[1]) for name in tensors}
    return {layer: KeptRows(*(tensors[f"layers.{layer}.{unit}"] for unit in UNITS)) for layer in sorted(layers)}
