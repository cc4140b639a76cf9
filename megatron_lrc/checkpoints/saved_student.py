"""A checkpoint's student, read in one process and without megatron-core: what exports and comparisons of models need.

What a checkpoint holds is said in `mcore/checkpoint.py`, which writes it.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from megatron_lrc.checkpoints.boxes import read_box
from megatron_lrc.checkpoints.index import UnsafeCheckpoint, read_index
from megatron_lrc.checkpoints.layout import NORMS, PROJECTIONS, SITES, all_boxes, box_of, rows_box
from megatron_lrc.checkpoints.run_directory import STATE_FILE, find_changed, find_missing, newest_checkpoint, read_state
from megatron_lrc.clone.sites import EMBED, LM_HEAD, HeadLayout, select
from megatron_lrc.config import Config, ConfigError, ModelShape


class _Reader(FileSystemReader):
    """Reads by an index that has been read already, and safely."""

    def __init__(self, path: Path, index: Metadata):
        super().__init__(path)
        self._index = index

    def read_metadata(self, *_: object, **__: object) -> Metadata:
        return self._index


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint under one prefix, each read whole when it is asked for."""

    def __init__(self, reader: _Reader, sizes: dict[str, TensorStorageMetadata], prefix: str):
        self._reader, self._prefix = reader, prefix
        self._sizes = {key: size for key, size in sizes.items() if key.startswith(prefix)}

    def __getitem__(self, name: str) -> Tensor:
        key = self._prefix + name
        stored = self._sizes[key]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended: one process
            load_tensors({key: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)


class _Weights(Mapping[str, Tensor]):
    """The student's own weights in a checkpoint, by our names (`Weight.key`), rows in Hugging Face's order."""

    def __init__(self, reader: _Reader, index: Metadata, shape: ModelShape):
        self._reader, self._stored, self._shape = reader, index.state_dict_metadata, shape
        reader.set_up_storage_reader(index, is_coordinator=True)
        names = [
            name if box.layer is None else f"layers.{box.layer}.{name}"
            for box in all_boxes(shape)
            if box.key in self._stored
            for name in box.names
        ]
        self._names = dict.fromkeys(names)  # boxes are parts of tensors

    def __getitem__(self, name: str) -> Tensor:
        scope, _, kind = name.rpartition(".")
        if name in (EMBED.name, LM_HEAD.name):
            box = rows_box(self._shape, SITES[name], 0, self._shape.vocab_size)
        else:
            box = box_of(self._shape, kind, int(scope.split(".")[1]) if scope else None)
        stored = self._stored[box.key]
        assert isinstance(stored, TensorStorageMetadata)
        tensor = read_box(self._reader, stored, box)
        if len(box.names) == 1:
            return tensor
        return select(SITES[kind.removesuffix("_bias")], tensor, HeadLayout.of(self._shape)).flatten(0, 1)

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, slots=True)
class SavedStudent:
    """A checkpoint, open for reading in one process, on CPU.

    weights: those that are its own and not composed: all of them of ordinary training, whose projections and norms are
    empty. Projections of what is its own may be there too; they have made targets of the clone loss.
    """

    path: Path
    config: Config
    shape: ModelShape
    teacher_fingerprint: str
    step: int
    tokens: int
    projections: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    changed_at: int | None = None  # the step after which the method changed what is trained

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
    tensors = {key: size for key, size in index.state_dict_metadata.items() if isinstance(size, TensorStorageMetadata)}
    reader = _Reader(path, index)
    return SavedStudent(
        path=path,
        config=config,
        shape=shape,
        teacher_fingerprint=state.teacher_fingerprint,
        step=state.step,
        tokens=state.tokens,
        projections=_Tensors(reader, tensors, PROJECTIONS),
        norms=_Tensors(reader, tensors, NORMS),
        weights=_Weights(_Reader(path, index), index, shape),
        changed_at=state.changed_at,
    )
