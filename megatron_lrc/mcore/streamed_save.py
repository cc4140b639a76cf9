"""Writes a model as a megatron-core distributed checkpoint (`torch_dist`), a piece at a time, in one process.

megatron-core's own strategy wants every tensor in memory before it writes the first. Here a piece is made when it is
written and then forgotten, so memory holds one of them, whatever the model. The rest is `dist_checkpointing.save`: it
checks that the pieces cover every tensor once, and writes what says which format this is.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from megatron_lrc.clone.checkpoint_layout import Box
from megatron_lrc.clone.sites import CAPTURED_LINEARS
from megatron_lrc.config import ModelShape

#: What Megatron-LM looks for beside the weights: `iteration` 0, and the layout of linear_qkv (3.0: by KV group).
_COMMON = {"iteration": 0, "checkpoint_version": 3.0}

#: Modules of a layer whose `_extra_state` (FP8 scales) a GPTModel asks for; the first four also in the local spec.
_WITH_EXTRA_STATE = (*CAPTURED_LINEARS, "self_attention.core_attention")
_NORMS_WITH_EXTRA_STATE = ("self_attention.q_layernorm", "self_attention.k_layernorm")


@dataclass(frozen=True, slots=True)
class Piece:
    """What lies in a box: its dtype, known beforehand, and how to make it (shape `box.local_shape`)."""

    box: Box
    dtype: torch.dtype
    make: Callable[[], Tensor]


def save_pieces(directory: Path, pieces: Iterable[Piece], shape: ModelShape) -> None:
    """Write a model of this shape into an existing, empty directory. Makes a process group of one if there is none."""
    listed = list(pieces)
    is_alone = not dist.is_initialized()
    if is_alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        tensors = {f"{number}": _sharded(piece) for number, piece in enumerate(listed)}
        strategy = _Streamed(listed, list(_extra_states(shape)))
        dist_checkpointing.save({**_COMMON, "model": tensors}, str(directory), sharded_strategy=strategy)
    finally:
        if is_alone:
            dist.destroy_process_group()


def _sharded(piece: Piece) -> ShardedTensor:
    """A piece's place, without data. Every dimension is cut into equal lengths."""
    box = piece.box
    return ShardedTensor(
        key=box.key,
        data=None,
        dtype=piece.dtype,
        local_shape=box.local_shape,
        global_shape=box.global_shape,
        global_offset=box.offsets,
        axis_fragmentations=tuple(whole // own for whole, own in zip(box.global_shape, box.sizes, strict=True)),
        prepend_axis_num=len(box.sizes) - len(box.local_shape),
    )


def _extra_states(shape: ModelShape) -> Iterator[str]:
    """Names of the states beside weights: there is nothing in them, but loading fails for each that is missing."""
    layers = shape.num_layers
    for module in (*_WITH_EXTRA_STATE, *_NORMS_WITH_EXTRA_STATE * shape.has_qk_norm):
        for layer in range(layers):
            yield ShardedObject(f"decoder.layers.{module}._extra_state", None, (layers,), (layer,)).unique_key
    yield ShardedObject("decoder.final_layernorm._extra_state", None, (1,), (0,)).unique_key


class _Streamed(SaveShardedStrategy):
    """Writes the pieces it was made with; the sharded tensors that it is handed say the same of their places."""

    def __init__(self, pieces: list[Piece], extra_states: list[str]):
        super().__init__("torch_dist", 1)
        self._pieces, self._extra_states = pieces, extra_states

    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        # One thread and nothing copied ahead: pieces are made in order, each when the one before is on disk.
        writer = FileSystemWriter(checkpoint_dir, thread_count=1, per_thread_copy_ahead=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended: one process
            save_tensors({}, storage_writer=writer, planner=_Planner(self._pieces, self._extra_states), no_dist=True)


class _Planner(DefaultSavePlanner):
    def __init__(self, pieces: list[Piece], extra_states: list[str]):
        super().__init__()
        self._pieces = {(piece.box.key, piece.box.offsets): piece for piece in pieces}
        self._extra_states = extra_states

    def create_local_plan(self) -> SavePlan:
        positions: dict[str, itertools.count] = {}
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._extra_states]
        for piece in self._pieces.values():
            box = piece.box
            index = MetadataIndex(box.key, box.offsets, next(positions.setdefault(box.key, itertools.count())))
            chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
            data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(box.global_shape))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor | list[None]:
        if index.offset is None:
            return [None]  # megatron-core stores a list of the objects that share a name
        piece = self._pieces[index.fqn, tuple(index.offset)]
        return piece.make().view(piece.box.sizes)
