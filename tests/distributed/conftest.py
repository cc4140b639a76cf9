"""Teachers that several modules of these tests train on."""

import pytest

from hf_teachers import write_qwen2


@pytest.fixture(scope="session")
def tied_qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tied Qwen2 with q, k and v biases: 4 layers, 48 hidden, 2 KV groups of 2 heads, 80 neurons. Its directory."""
    folder = tmp_path_factory.mktemp("qwen")
    write_qwen2(folder, is_tied=True, num_layers=4)
    return str(folder)
