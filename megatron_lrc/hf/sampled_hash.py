"""How earlier versions told teachers from others: by samples of their files. Only to read what those wrote.

A changed byte between the samples is not seen, so every use of these is said to the user. New checkpoints and
conversions have the hash of `content_hash.py`, which begins with its PREFIX; these are 64 hexadecimal digits.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_lrc.hf.content_hash import PREFIX

_SAMPLE_BYTES, _NUM_SAMPLES = 65536, 16


def is_sampled(fingerprint: str) -> bool:
    return not fingerprint.startswith(PREFIX)


def sampled_fingerprint(config_values: Mapping[str, Any], paths: Iterable[Path]) -> str:
    """sha256 over config.json, and every safetensors file's size, header, and samples of its data."""
    digest = hashlib.sha256(json.dumps(dict(config_values), sort_keys=True).encode())
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        for part in _samples(path):
            digest.update(part)
    return digest.hexdigest()


def sampled_files(folder: Path, files: Mapping[str, int]) -> str:
    """sha256 over parts of each file, evenly spaced. files: their sizes."""
    digest = hashlib.sha256()
    for name, size in sorted(files.items()):
        digest.update(f"{name} {size}".encode())
        with open(folder / name, "rb") as file:
            for sample in range(_NUM_SAMPLES):
                file.seek(max(size - _SAMPLE_BYTES, 0) * sample // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _samples(path: Path) -> Iterator[bytes]:
    """The header and three samples of the data of a safetensors file."""
    with open(path, "rb") as stream:
        length = stream.read(8)
        header_end = 8 + int.from_bytes(length, "little")
        yield length + stream.read(header_end - 8)
        last = max(header_end, path.stat().st_size - _SAMPLE_BYTES)
        for start in (header_end, (header_end + last) // 2, last):
            stream.seek(start)
            yield stream.read(_SAMPLE_BYTES)
