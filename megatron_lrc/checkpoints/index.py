"""The pickles in a `torch_dist` checkpoint, read without running what a pickle can make a reader run.

torch.distributed.checkpoint keeps its index as a pickle (.metadata), and megatron-core keeps small objects as pickles
too: in common.pt (0.16) and between the tensors. Their own loaders execute them, and open any path that the index
names. So `read_index` holds an index against the files beside it, and `refuse_code` reads every other pickle first,
knowing torch's plain types and nothing else. Nothing of torch or megatron-core opens a checkpoint before.
"""

import io
import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_lrc.checkpoints.index_pickle import unpickle_index
from megatron_lrc.json_files import read_json
from megatron_lrc.plain_files import file_beside

INDEX_FILE, COMMON_FILE, FORMAT_FILE = ".metadata", "common.pt", "metadata.json"
#: What metadata.json says of every checkpoint that megatron-core 0.16 and 0.19 write here; it chooses the loader.
_FORMAT = {"sharded_backend": "torch_dist", "common_backend": "torch"} | {
    name: 1 for name in ("sharded_backend_version", "common_backend_version")
}


class UnsafeCheckpoint(Exception):
    """A pickle of a checkpoint cannot be read, or holds what does not belong there. Names the file and the reason."""


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint, of the classes of an index and plain values, and true of the files beside it.

    Every tensor lies whole in regular files of the folder. Takes about 0.3 ms for each stored piece of a tensor.
    UnsafeCheckpoint for anything else.
    """
    path = folder / INDEX_FILE
    try:
        index = unpickle_index(path.read_bytes())
        _check_fields(index)
        _check_files(index, folder)
        _check_tensors(index)
    except Exception as error:  # a damaged pickle may raise anything
        raise UnsafeCheckpoint(f"{path} is not the index of a checkpoint ({_one_line(error)})") from error
    return index


def refuse_code(folder: Path) -> Metadata:
    """The index, where loading this checkpoint cannot run code of whoever wrote it; UnsafeCheckpoint where it could.

    Reads the pickles only.
    """
    index = read_index(folder)
    _check_format(folder)
    if (common := folder / COMMON_FILE).exists():
        _load_plain(common.read_bytes(), str(common))
    for place, stored in index.storage_data.items():
        if isinstance(index.state_dict_metadata[place.fqn], BytesStorageMetadata):
            with open(file_beside(folder, stored.relative_path), "rb") as file:
                file.seek(stored.offset)
                _load_plain(file.read(stored.length), f"{place.fqn} in {folder}")
    return index


def _check_fields(index: Any) -> None:
    """ValueError unless the fields that loaders follow are what their types say."""
    _expect(type(index) is Metadata, f"it holds a {type(index).__name__}")
    _expect(type(index.state_dict_metadata) is dict and type(index.storage_data) is dict, "its tables are none")
    for name, entry in index.state_dict_metadata.items():
        _expect(type(name) is str, "a name is no text")
        _expect(type(entry) in (TensorStorageMetadata, BytesStorageMetadata), f"{name} is no tensor and no object")
        if type(entry) is TensorStorageMetadata:
            _expect(_is_tensor(entry), f"{name} is no tensor")
    places: dict[Any, Any] = index.storage_data
    for place, stored in places.items():
        _expect(type(place) is MetadataIndex and place.fqn in index.state_dict_metadata, "a place belongs to nothing")
        _expect(type(stored) is _StorageInfo, f"{place.fqn} lies nowhere")
        _expect(all(type(number) is int and number >= 0 for number in (stored.offset, stored.length)), "odd offsets")
        _expect(not getattr(stored, "transform_descriptors", None), f"{place.fqn} is packed")


def _is_tensor(entry: TensorStorageMetadata) -> bool:
    return (
        type(entry.properties) is TensorProperties
        and type(entry.properties.dtype) is torch.dtype
        and type(entry.size) is torch.Size
        and type(entry.chunks) is list
        and all(type(chunk) is ChunkStorageMetadata for chunk in entry.chunks)
        and all(type(part) is torch.Size for chunk in entry.chunks for part in (chunk.offsets, chunk.sizes))
        and all(number >= 0 for chunk in entry.chunks for number in (*entry.size, *chunk.offsets, *chunk.sizes))
    )


def _check_files(index: Metadata, folder: Path) -> None:
    """ValueError unless what the index names are files beside it, long enough."""
    ends: dict[object, int] = {}
    for stored in index.storage_data.values():
        _expect(type(stored.relative_path) is str, "a file has no name")
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, end in ends.items():
        _expect(file_beside(folder, name).stat().st_size >= end, f"{name} is shorter than the index says")


def _check_tensors(index: Metadata) -> None:
    """ValueError unless the pieces of each tensor are as many bytes as it has, so that its size is no mere claim."""
    for name, entry in index.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            continue
        counts = [math.prod(chunk.sizes) for chunk in entry.chunks]
        _expect(sum(counts) == math.prod(entry.size), f"the pieces of {name} do not make it up")
        for chunk, count in zip(entry.chunks, counts, strict=True):
            stored = index.storage_data.get(MetadataIndex(name, chunk.offsets))
            is_there = stored is not None and stored.length >= count * entry.properties.dtype.itemsize
            _expect(is_there, f"a piece of {name} is not there")


def _check_format(folder: Path) -> None:
    path = folder / FORMAT_FILE
    try:
        found = read_json(path)
        _expect(isinstance(found, dict) and "sharded_backend" in found, "it says nothing of it")
        other = [name for name, wanted in _FORMAT.items() if found.get(name, wanted) != wanted]
        _expect(not other, f"another {' and '.join(other)}")
    except (OSError, ValueError) as error:
        raise UnsafeCheckpoint(f"{path} does not name the format of a checkpoint ({_one_line(error)})") from error


def _load_plain(content: bytes, name: str) -> None:
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise UnsafeCheckpoint(f"{name} holds more than tensors and plain values ({_one_line(error)})") from error


def _expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ValueError(otherwise)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
