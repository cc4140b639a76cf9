"""How weights are cut into files, and how the size of one is given."""

import pytest

from megatron_lrc.config import ConfigError
from megatron_lrc.hf.safetensors_writer import parse_size, plan_shards


def test_shards_are_cut_in_order_and_a_large_tensor_stands_alone() -> None:
    assert plan_shards({"a": 3, "b": 3, "c": 9, "d": 1}, 6) == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("300 mb", 3 * 10**8), ("64KB", 64_000), ("12", 12)])
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "5TB", "-1GB", "1.5GB", ""])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-shard-size"):
        parse_size(text)
