"""Fixtures: tiny teachers and datasets. Ranks are spawned by `ranks.py`; the oracle is `reference.py`."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from full_size_teachers import write_full_size_teachers
from hf_teachers import write_llama
from tiny_data import write_counting

# So that their failing assertions show values, as those of test modules do.
pytest.register_assert_rewrite("command_line", "config_cases", "convert_tool", "gradient_cases")
pytest.register_assert_rewrite("preprocess_tool", "run_comparison", "runs", "small_disks")


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
def full_size_teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of `write_full_size_teachers`, by name; not to be changed. The workers of a run share them: what is
    read of a teacher, all of it, is remembered for all."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "full_size_teachers"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            write_full_size_teachers(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of an indexed dataset: `write_counting`."""
    return write_counting(Path(tmp_path_factory.mktemp("text")) / "counting")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what runs only when asked for, whatever other markers are chosen; and the longest come first, so that
    the workers end together."""
    items.sort(key=lambda item: "end_to_end" not in item.path.parts)  # stable
    if "chaos" not in (config.option.markexpr or ""):
        asked_for = [item for item in items if not item.get_closest_marker("chaos")]
        config.hook.pytest_deselected(items=[item for item in items if item not in asked_for])
        items[:] = asked_for


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Several ranks share the machine; and results must not depend on how many threads there are."""
    torch.set_num_threads(1)
