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
from megatron_lrc.checkpoints.layout import NORMS, PROJECTIONS, Box, all_boxes, box_of, whole_box
from megatron_lrc.checkpoints.run_directory import (
    STATE_FILE,
    RunState,
    find_changed,
    find_missing,
    newest_checkpoint,
    read_state,
)
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
    empty. Projections of what is its own may be there too; they have made targets of the clone loss.
    """

    path: Path
    config: Config
    shape: ModelShape
    state: RunState
    projections: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]

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
    try:
        index = read_index(path)
    except UnsafeCheckpoint as error:
        raise ConfigError(f"{error}. Give a checkpoint that megatron_lrc wrote.") from None
    files = FileSystemReader(path)
    files.set_up_storage_reader(index, is_coordinator=True)
    kinds = _boxes_under(PROJECTIONS, index), _boxes_under(NORMS, index), _boxes_of_weights(shape, index)
    projections, norms, weights = (_Tensors(files, index, boxes, HeadLayout.of(shape)) for boxes in kinds)
    return SavedStudent(path, config, shape, state, projections=projections, norms=norms, weights=weights)
