"""What a distributed checkpoint holds, read with torch alone: nothing of the package."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every global tensor of a checkpoint folder, by its key."""
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        key: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended: one process
        load(dict(tensors), storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return tensors


def read_objects(checkpoint: Path) -> dict[str, Any]:
    """What is no sharded tensor: the optimizer's settings, counts of steps, the loss scale."""
    return torch.load(checkpoint / "common.pt", map_location="cpu", weights_only=True)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(tensor: Tensor) -> str:
    """Data type, shape and SHA-256 of the values: equal for equal bits only."""
    sizes = "x".join(map(str, tensor.shape))
    values = hashlib.sha256(bytes_of(tensor)).hexdigest()
    return f"{str(tensor.dtype).removeprefix('torch.')} [{sizes}] {values}"


#: Keys of tensors that have a row for each token of the vocabulary end so, their optimizer state's too.
_VOCABULARY_KEYS = ("word_embeddings.weight", "output_layer.weight")


def without_padding(tensors: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Without the rows that the layout which wrote them has added to the vocabulary."""
    padded = {key: tensor[:vocab_size] for key, tensor in tensors.items() if key.endswith(_VOCABULARY_KEYS)}
    return tensors | padded
