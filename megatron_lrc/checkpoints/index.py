"""The pickles in a `torch_dist` checkpoint, read without running what a pickle can make a reader run.

torch.distributed.checkpoint keeps its index as a pickle (.metadata), and megatron-core keeps small objects as pickles
too: in common.pt (0.16) and between the tensors. Their own loaders execute them. So `refuse_code` reads every one of
them first, with unpicklers that know an index's classes and torch's plain types and nothing else.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

INDEX_FILE, COMMON_FILE = ".metadata", "common.pt"

#: What an index is made of, by module. dtypes are names in `torch`.
_INDEX_CLASSES: Mapping[str, tuple[str, ...]] = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    # The plans of the ranks that wrote it, which megatron-core keeps in the index.
    "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch": ("Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}


class UnsafeCheckpoint(Exception):
    """A pickle of a checkpoint cannot be read, or holds what does not belong there. Names the file and the reason."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if name not in _INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint. Nothing but the classes of an index comes out of it."""
    path = folder / INDEX_FILE
    try:
        with open(path, "rb") as file:
            index = _IndexUnpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise UnsafeCheckpoint(f"{path} is not the index of a checkpoint ({_one_line(error)})") from error
    if not isinstance(index, Metadata):
        raise UnsafeCheckpoint(f"{path} is not the index of a checkpoint (it holds a {type(index).__name__})")
    return index


def refuse_code(folder: Path) -> None:
    """UnsafeCheckpoint if loading this checkpoint could run code of whoever wrote it. Reads the pickles only."""
    index = read_index(folder)
    if (common := folder / COMMON_FILE).exists():
        _load_plain(common.read_bytes(), str(common))
    objects = {key for key, entry in index.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)}
    for place, stored in (index.storage_data or {}).items():
        if place.fqn in objects:
            with open(folder / Path(stored.relative_path).name, "rb") as file:
                file.seek(stored.offset)
                _load_plain(file.read(stored.length), f"{place.fqn} in {folder}")


def _load_plain(content: bytes, name: str) -> None:
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise UnsafeCheckpoint(f"{name} holds more than tensors and plain values ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
