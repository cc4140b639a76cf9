"""Fixtures of several modules: a tokenizer, a disk that can be filled, a configuration with nothing wrong."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lrc.config import Config
from small_disks import small_disk_at
from tiny_data import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer as a Hugging Face directory: `write_tokenizer`."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 1 MiB."""
    with small_disk_at(tmp_path / "disk", size="1m") as disk:
        yield disk


@pytest.fixture
def valid_config(tmp_path: Path) -> Config:
    """A configuration with nothing wrong, for one process; each test spoils it in one way."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    config = Config()
    config.model.teacher = str(teacher)
    config.model.student_hidden_size = 384
    config.training.train_iters = 100
    config.data.data_path = ["text"]
    return config
