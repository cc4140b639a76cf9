"""What tells one dataset from another, wherever it lies: the .idx whole, of the .bin its size and samples, the manifest
without the paths in it.

A .bin may have terabytes, which every rank would have to read. A difference between the samples is not seen; but data
made of other text, by another tokenizer or in another order has another .idx, or other samples.
"""

import functools
import hashlib
import json
import os
from typing import Any

from megatron_lrc.config import Config
from megatron_lrc.data.blends import plan_data
from megatron_lrc.data.indexed_files import read_indexed_file
from megatron_lrc.os_errors import explained

_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of a .bin, evenly spread, both ends among them
_SHOWN = 16  # hexadecimal digits


def describe_data(config: Config) -> dict[str, str]:
    """`dataset 1 of --data-path` -> digests of its three files, and `weights of --data-path`. ConfigError for a dataset
    that is damaged."""
    plan, found = plan_data(config), {}
    for blend in (plan.train, plan.valid):
        if blend:
            for number, prefix in enumerate(blend.prefixes, start=1):
                found[f"dataset {number} of {blend.flag}"] = _describe_dataset(prefix)
            found[f"the list of weights of {blend.flag}"] = str(blend.weights)
    return found


@explained()
def index_digest(prefix: str) -> str:
    """sha256 of the .idx. Read once by a process, as long as the file stays the same: some have 400 MB."""
    path = f"{prefix}.idx"
    stat = os.stat(path)
    return _digest_of_file(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))


@functools.cache
def _digest_of_file(path: str, _: tuple[int, int, int]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def _describe_dataset(prefix: str) -> str:
    manifest = read_indexed_file(prefix).manifest
    digests = {".idx": index_digest(prefix), ".bin": _digest_of_samples(f"{prefix}.bin")}
    digests |= {".json": _digest_of_manifest(manifest)} if manifest else {}
    return ", ".join(f"{suffix} {digest[:_SHOWN]}" for suffix, digest in digests.items())


@explained()
def _digest_of_samples(path: str) -> str:
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _digest_of_manifest(manifest: dict[str, Any]) -> str:
    """Without where text and tokenizer lay when it was written."""
    kept = {name: value for name, value in manifest.items() if name != "sources"}
    kept["tokenizer"] = {name: value for name, value in manifest["tokenizer"].items() if name != "model"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
