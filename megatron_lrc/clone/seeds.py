"""Random numbers by name: the same on every rank, machine and layout."""

import hashlib

import torch


def generator_of(seed: int, name: str) -> torch.Generator:
    """On the CPU, from the run's --seed and the name of what is drawn."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
