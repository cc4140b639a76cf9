"""Fixtures: tiny teachers and datasets. Ranks are spawned by `ranks.py`; the oracle is `reference.py`."""

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from hf_teachers import write_llama
from tiny_data import write_dataset


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`tiny_llama(is_tied=..., num_layers=..., ...)`, as `write_llama` -> directory, written once per session."""
    written: dict[tuple, str] = {}

    def directory(**settings) -> str:
        key = tuple(sorted(settings.items()))
        if key not in written:
            folder = tmp_path_factory.mktemp("llama")
            write_llama(folder, **settings)
            written[key] = str(folder)
        return written[key]

    return directory


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of an indexed dataset that can be learned: noisy counting within 64 of `write_llama`'s 301 tokens."""
    generator = numpy.random.default_rng(0)
    documents = []
    for _ in range(200):
        steps = generator.choice([1, 1, 1, 2, 5], size=50)
        documents.append(((generator.integers(64) + numpy.cumsum(steps)) % 64 + 100).tolist())
    return write_dataset(Path(tmp_path_factory.mktemp("text")) / "counting", documents)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Several ranks share the machine; and results must not depend on how many threads there are."""
    torch.set_num_threads(1)
