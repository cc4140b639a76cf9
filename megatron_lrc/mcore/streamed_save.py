"""Writes a model as a megatron-core distributed checkpoint (`torch_dist`), a piece at a time, in one process.

megatron-core's own writer wants every tensor in memory before it writes the first. Here a piece is made when it is
written and then forgotten, so memory holds one of them, whatever the model; no process group is needed. The files are
those of torch.distributed.checkpoint, whose planner checks that the pieces cover every tensor once, and megatron-core's
two beside them.
"""

import itertools
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from megatron_lrc.checkpoints.layout import Box
from megatron_lrc.clone.sites import CAPTURED_LINEARS
from megatron_lrc.config import ModelShape

#: What Megatron-LM wants to know beside the weights: iteration 0, linear_qkv by KV group (3.0), and a layout that it
#: compares with its own. Versions of megatron-core that keep this elsewhere read it from this file too.
_COMMON_FILE = "common.pt"
_COMMON = {
    "iteration": 0,
    "checkpoint_version": 3.0,
    "args": Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1),
}

#: Modules of a layer whose `_extra_state` (FP8 scales) a GPTModel asks for; of the local spec only the linear ones.
_WITH_EXTRA_STATE = (*CAPTURED_LINEARS, "self_attention.core_attention")
_NORMS_WITH_EXTRA_STATE = ("self_attention.q_layernorm", "self_attention.k_layernorm")


@dataclass(frozen=True, slots=True)
class Piece:
    """What lies in a box: its dtype, known beforehand, and how to make it (shape `box.local_shape`)."""

    box: Box
    dtype: torch.dtype
    make: Callable[[], Tensor]


def save_pieces(directory: Path, pieces: Iterable[Piece], shape: ModelShape) -> None:
    """Write a model of this shape into an existing, empty directory. OSError where that fails."""
    # One thread and nothing copied ahead: pieces are made in order, each when the one before is on disk.
    writer = FileSystemWriter(directory, thread_count=1, per_thread_copy_ahead=0)
    planner = _Planner(pieces, _extra_states(shape))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended: one process
        try:
            save_tensors({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:  # even an interrupt comes wrapped, and a wrapping is no Exception
            ((failure, _),) = error.failures.values()
            if isinstance(failure, RuntimeError):  # what torch makes of a failed write
                reason = str(failure).partition("\n")[0]
                raise OSError(f"{directory} could not be written; the disk may be full ({reason})") from failure
            raise failure from None
    torch.save(_COMMON, directory / _COMMON_FILE)
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))


def _extra_states(shape: ModelShape) -> Iterator[str]:
    """Names of the states beside weights: there is nothing in them, but loading fails for each that is missing."""
    layers = shape.num_layers
    for module in (*_WITH_EXTRA_STATE, *_NORMS_WITH_EXTRA_STATE * shape.has_qk_norm):
        for layer in range(layers):
            yield ShardedObject(f"decoder.layers.{module}._extra_state", None, (layers,), (layer,)).unique_key
    yield ShardedObject("decoder.final_layernorm._extra_state", None, (1,), (0,)).unique_key


class _Planner(DefaultSavePlanner):
    """Says where each piece lies, and makes it when its turn to be written comes."""

    def __init__(self, pieces: Iterable[Piece], extra_states: Iterable[str]):
        super().__init__()
        self._pieces = {(piece.box.key, piece.box.offsets): piece for piece in pieces}
        self._extra_states = list(extra_states)

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
