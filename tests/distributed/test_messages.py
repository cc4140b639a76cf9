"""Between pipeline stages the student's gradient travels alone, and everything is as if the teacher's zeros came too.

How many bytes that is `test_communication.py` counts.
"""

import pytest
import torch

from gradient_cases import Layout, clone_gradients, gradient_config
from megatron_lrc.config import Config
from megatron_lrc.mcore import schedules
from ranks import run_ranks


def with_whole_messages(config: Config) -> tuple[dict, dict, dict]:
    """On a rank, with megatron-core's own communication."""
    schedules.own_messages = lambda *_: {}  # in a process of this test's
    return clone_gradients(config)


@pytest.mark.distributed
@pytest.mark.parametrize("chunks", [1, 2])
def test_gradients_are_those_of_whole_messages_bit_for_bit(tiny_llama, chunks):
    """Without and with interleaving, where messages arrive while a stage computes. Six micro-batches of two ranks."""
    layout = Layout(pp=2, chunks=chunks, micro=4)
    config = gradient_config(tiny_llama(num_layers=4, dtype=torch.float64), layout, untie=True)
    short, whole = (run_ranks(2, function, config) for function in (clone_gradients, with_whole_messages))
    torch.testing.assert_close(short, whole, rtol=0, atol=0)
