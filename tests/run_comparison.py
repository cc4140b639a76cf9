"""Whether a run came out like another one, bit for bit, and whether its checkpoints were left alone meanwhile."""

import hashlib
import json
import warnings
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors


def complete(run: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(path for path in run.glob("iter_*") if "." not in path.name and (path / "run.json").is_file())


def hashes(checkpoint: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.iterdir()}


def lines(run: Path, name: str) -> list[dict]:
    file = run / name
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def last_step(run: Path) -> int:
    found = lines(run, "metrics.jsonl")
    return found[-1]["step"] if found else 0


def numbers(run: Path, name: str) -> list[dict]:
    """Records without what is different each time: times and memory."""
    varying = ("seconds", "per_second", "memory", "mfu", "tflops", "slowest", "time")
    return [
        {key: value for key, value in line.items() if not any(word in key for word in varying)}
        for line in lines(run, name)
    ]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint that is a tensor, whole."""
    reader = CachedMetadataFileSystemReader(str(checkpoint))
    sizes = reader.read_metadata().state_dict_metadata
    found = {
        key: torch.empty(size.size, dtype=size.properties.dtype)
        for key, size in sizes.items()
        if isinstance(size, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load_tensors(dict(found), storage_reader=reader, no_dist=True)
    return found


def check_same(run: Path, expected: Path, *, steps: int) -> None:
    found, wanted = numbers(run, "metrics.jsonl"), numbers(expected, "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, steps + 1))
    assert found == wanted
    # A run that is told to stop leaves out the validation that is due.
    found, wanted = numbers(run, "validation.jsonl"), numbers(expected, "validation.jsonl")
    validated = [line["step"] for line in found]
    assert validated == sorted(set(validated)), validated
    assert found == [line for line in wanted if line["step"] in validated]
    found, wanted = tensors(complete(run)[-1]), tensors(complete(expected)[-1])
    assert found.keys() == wanted.keys() and any(key.startswith("optimizer") for key in found)
    for key in found:
        assert torch.equal(found[key], wanted[key]), key
    assert complete(run)[-1].name == complete(expected)[-1].name


class Ledger:
    """What the checkpoints of a run hold: none that was ever good may change or go."""

    def __init__(self, run: Path):
        self._run = run
        self._good: dict[Path, dict[str, str]] = {}
        self.damaged: dict[Path, dict[str, str]] = {}

    def best(self) -> tuple[Path | None, bool]:
        """The newest good checkpoint, and whether there is no newer one."""
        good = [path for path in complete(self._run) if path not in self.damaged]
        return (good or [None])[-1], not self.damaged or (bool(good) and good[-1] > max(self.damaged))

    def check(self, newly_damaged: set[Path]) -> None:
        # A damaged one was passed over, and its step is saved once more when the run comes by.
        self.damaged = {path: content for path, content in self.damaged.items() if hashes(path) == content}
        self.damaged |= {path: hashes(path) for path in newly_damaged}
        present = {path: hashes(path) for path in complete(self._run) if path not in self.damaged}
        for path, content in self._good.items():
            assert path in newly_damaged or present.get(path) == content, f"{path.name} has changed"
        self._good = present
