"""What a narrower data type cannot hold is refused only where a tensor is lost by it."""

import pytest
import torch

from megatron_lrc.config import ConfigError
from megatron_lrc.hf.narrowing import narrowed


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0.0, -0.0], torch.float16),  # was zero
        ([1e-9, 1e-3], torch.float16),  # one value of several
        ([6e-8], torch.float16),
        ([float("inf"), float("nan"), 1.0], torch.float16),  # as they were
        ([], torch.float16),
        ([1e-40], torch.bfloat16),
        ([1e-45], torch.float64),
    ],
)
def test_values_are_rounded(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values)
    assert torch.equal(narrowed(tensor, dtype, "x").isnan(), tensor.isnan())


@pytest.mark.parametrize(
    ("values", "dtype", "words"),
    [
        ([1e-9, -2e-8, 0.0], torch.float16, "x has values of up to 2e-08 only.* as zero. Give --dtype bfloat16 or"),
        ([1e-45], torch.bfloat16, "holds 9.18e-41 at least: .* as zero. Give --dtype float32"),
        ([3.4e38], torch.bfloat16, "as infinity. Give --dtype float32"),
        ([0.0, 7e4], torch.float16, "x has values of up to 70000, .* as infinity. Give --dtype bfloat16 or float32"),
    ],
)
def test_a_tensor_that_would_be_lost_is_refused(values: list[float], dtype: torch.dtype, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        narrowed(torch.tensor(values), dtype, "x")
