"""Reads part of a tensor of a megatron-core distributed checkpoint: the pieces that it overlaps, and no more of it.

No process group is needed.
"""

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_lrc.checkpoints.layout import SITES, Box
from megatron_lrc.clone.sites import HeadLayout, select


def read_box(files: FileSystemReader, stored: TensorStorageMetadata, box: Box) -> Tensor:
    """What lies in a box [*box.local_shape], in the stored dtype. files: with the index set up; stored: its entry."""
    tensor = torch.empty(box.sizes, dtype=stored.properties.dtype)
    if tensor.numel():
        chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
        plan = LoadPlan(create_read_items_for_chunk_list(box.key, stored, [chunk]))
        files.read_data(plan, _Planner(tensor)).wait()
    return tensor.view(box.local_shape)


def take(name: str, content: Tensor, box: Box, heads: HeadLayout) -> Tensor:
    """The tensor of one of `box.names` out of what lies in its box, in Hugging Face's order of rows."""
    if len(box.names) == 1:
        return content
    return select(SITES[name.removesuffix("_bias")], content, heads).flatten(0, 1)


class _Planner(DefaultLoadPlanner):
    """Reads one box of one tensor: every item goes to its place in `target`."""

    def __init__(self, target: Tensor):
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            place = place.narrow(dim, start, length)
        return place
