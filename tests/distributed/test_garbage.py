"""Between the loop's collections nothing of a device's memory waits for one, and Python starts none."""

import gc
import os

import pytest
import torch

from megatron_lrc.config import Config
from megatron_lrc.mcore import distributed
from megatron_lrc.train import garbage, loop
from megatron_lrc.train.start_checks import check
from megatron_lrc.train.step import evaluate, train_step
from ranks import run_ranks
from runs import make_config


def tensors_in_cycles(config: Config) -> list[str]:
    """On a rank: what a step and a validation leave that only a collection would free."""
    trainer = loop.Trainer(config, check(config, distributed.world_size()), distributed.start(config))
    batches = trainer._batches(trainer.train_data, 0)
    train_step(trainer.run, batches, with_group_norms=True)
    with garbage.collected_by_the_loop():
        gc.set_debug(gc.DEBUG_SAVEALL)
        train_step(trainer.run, batches, with_group_norms=True)
        evaluate(trainer.run, batches, num_batches=1)
        gc.collect()
        gc.set_debug(0)
    return [str(tuple(found.shape)) for found in gc.garbage if isinstance(found, torch.Tensor) and found.numel() > 1]


@pytest.mark.distributed
@pytest.mark.parametrize("recompute", [None, "full"])
def test_a_step_leaves_no_tensor_in_a_cycle(tiny_llama, tiny_text, tmp_path, recompute):
    config = make_config(tiny_llama(), tiny_text, tmp_path, steps=3)
    config.parallel.recompute_granularity = recompute
    assert run_ranks(1, tensors_in_cycles, config.resolved(1)) == [[]]


def test_python_collects_nothing_within_the_loop_but_in_what_it_forks():
    class Node:
        freed = 0

        def __del__(self) -> None:
            Node.freed += 1

    def leave_a_cycle() -> None:
        node = Node()
        node.itself = node

    kept = [[] for _ in range(10)]
    with garbage.collected_by_the_loop():
        assert not gc.isenabled() and not any(found is kept for found in gc.get_objects())
        leave_a_cycle()
        for step in range(1, garbage.STEPS):
            garbage.collect_after(step)
        assert Node.freed == 0
        garbage.collect_after(garbage.STEPS)
        assert Node.freed == 1
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert gc.isenabled() and gc.get_freeze_count() == 0
