"""Memory that runs out is one sentence: when, where, and what takes less."""

import pytest
import torch

from megatron_lrc.config import Config, RunFailed, RunStopped
from megatron_lrc.memory_errors import is_out_of_memory
from megatron_lrc.train import loop
from megatron_lrc.train.out_of_memory import told_in_a_sentence
from ranks import run_ranks
from runs import make_config


def train_until_full(config: Config, at: int) -> tuple[str, str]:
    """Train, and ask for more than any machine has in the step `at`. Error, message."""
    calls, step = 0, loop.train_step

    def step_or_fill(*args, **kwargs):
        nonlocal calls
        calls += 1
        return torch.empty(1 << 55) if calls == at else step(*args, **kwargs)

    loop.train_step = step_or_fill
    try:
        loop.train(config)
    except (RunStopped, RunFailed) as error:
        return type(error).__name__, str(error)
    finally:
        loop.train_step = step
    return "", ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("at", "kind", "when"),
    [
        (1, "RunStopped", "after step 0 of 4, in train/loop.py:"),
        (3, "RunFailed", "after step 2 of 4, in train/loop.py:"),
    ],
)
def test_a_run_says_when_and_where_it_ran_out_and_what_takes_less(tiny_llama, tiny_text, tmp_path, at, kind, when):
    """Only after a step of its own may another start end otherwise."""
    config = make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=4)
    ((error, message),) = run_ranks(1, train_until_full, config.resolved(1), at)
    assert error == kind and f"The memory ran out {when}" in message
    assert "you tried to allocate 144115188075855872 bytes" in message and "\n" not in message
    assert "Take a smaller --micro-batch-size (it is 2), --recompute-granularity full, --use-distributed" in message
    assert message.endswith("the estimate of this run by part.")


def test_models_that_do_not_fit_are_not_built_again():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    message = r"The memory ran out while the models were built, in another library \(CUDA out of memory. Tried to"
    with pytest.raises(RunStopped, match=message), told_in_a_sentence(Config(), lambda: None):
        raise error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("NCCL Error 1: unhandled cuda error ... Cuda failure 2 'out of memory'"), True),
        (MemoryError(), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
)
def test_what_counts_as_memory_that_ran_out(error, expected):
    assert is_out_of_memory(error) == expected
