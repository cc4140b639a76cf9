"""Writes safetensors files tensor by tensor: one tensor in memory at a time, whatever the size of the file.

`safetensors.torch.save_file` wants all tensors of a file at once; projections.safetensors alone is gigabytes for a 3B
teacher. The format allows better: 8 bytes of header length, a JSON header of dtypes, shapes and offsets, then the
data in that order, and all of the header follows from the shapes.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_lrc.config import ConfigError
from megatron_lrc.hf.narrowing import narrowed
from megatron_lrc.hf.teacher import DTYPES, INDEX_FILE, SINGLE_FILE

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "300MB", "64KB" or "1000000"."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise ConfigError(
            f"--max-shard-size {text} is not a size. A positive number of bytes, KB, MB or GB is expected, as in 5GB."
        )
    return int(match[1]) * _UNITS[match[2]]


def write_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype, tensor_of: Callable[[str], Tensor]
) -> None:
    """One safetensors file holding `tensor_of(name)` in `dtype` for each name of `shapes`, asked for in that order.

    ConfigError where a value would become infinite in `dtype`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts aligned
    with open(path, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            tensor = tensor_of(name)
            assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)} composed, {shape} expected"
            data = narrowed(tensor.detach().cpu(), dtype, name).contiguous().flatten().view(torch.uint8)
            stream.write(data.numpy().data)


def write_model(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    tensor_of: Callable[[str], Tensor],
    max_shard_size: int,
) -> None:
    """model.safetensors, or numbered shards of at most `max_shard_size` bytes (or one tensor) and their index."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, max_shard_size)
    if len(shards) == 1:
        write_tensors(directory / SINGLE_FILE, shapes, dtype=dtype, tensor_of=tensor_of)
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(directory / file, {name: shapes[name] for name in names}, dtype=dtype, tensor_of=tensor_of)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def plan_shards(sizes: Mapping[str, int], max_shard_size: int) -> list[list[str]]:
    """Names in their order, cut where the next one would not fit. A tensor above the limit is a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
