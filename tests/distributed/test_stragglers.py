"""What the ranks tell of themselves: the slow one is named, whatever makes it slow; memory is that of the largest."""

import time

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from megatron_lrc.config import Config
from megatron_lrc.mcore import distributed
from megatron_lrc.train import loop
from megatron_lrc.train.start_checks import check
from ranks import run_ranks
from runs import make_config, on_layout, records

NAP, SLOW = 0.03, 1


class SlowData(Dataset):
    """A dataset on a disk that takes its time."""

    def __init__(self, data):
        self._data, self.order = data, data.order

    def __len__(self):
        return len(self._data)

    def __getitem__(self, index):
        time.sleep(NAP)
        return self._data[index]


def train_with_a_slow_rank(config: Config, kind: str) -> None:
    """Rank SLOW reads its data slowly, computes more than the others, or holds more memory."""
    trainer = loop.Trainer(config, check(config, distributed.world_size()), distributed.start(config))
    block = None
    if dist.get_rank() == SLOW:
        if kind == "data":
            trainer.train_data = SlowData(trainer.train_data)
        elif kind == "compute":
            work = torch.ones(400, 400)
            trainer.run.stages[0].student.register_forward_pre_hook(
                lambda *_: [work @ work for _ in range(30)] and None
            )
        elif kind == "memory":
            block = torch.ones(1 << 28, dtype=torch.uint8)
    trainer.train()
    assert kind != "memory" or dist.get_rank() != SLOW or block is not None


@pytest.fixture
def straggler_config(tiny_llama, tiny_text, tmp_path) -> Config:
    config = make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=6)
    config.logging.log_interval, config.logging.eval_iters, config.logging.log_straggler = 3, 0, True
    return config


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["data", "compute"])
def test_the_slow_rank_is_named_with_what_it_is_slow_in(straggler_config, tmp_path, kind):
    run_ranks(2, train_with_a_slow_rank, straggler_config.resolved(2), kind)
    lines = records(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        slowest = line["straggler"]
        assert slowest["rank"] == SLOW and slowest["percent_over"] > 20
        data, compute = slowest["data_seconds"], slowest["compute_seconds"]
        if kind == "data":  # 4 of a step's 8 sequences are its own
            assert 4 * NAP <= data < line["step_seconds"] and compute < data
        else:
            assert compute > slowest["peers_seconds"] > data


@pytest.mark.distributed
def test_memory_is_that_of_the_rank_with_the_most(straggler_config, tmp_path):
    straggler_config.logging.log_straggler = False
    run_ranks(2, train_with_a_slow_rank, on_layout(straggler_config, pp=2).resolved(2), "none")
    without = records(tmp_path / "run")[-1]
    straggler_config.checkpoint.save = str(tmp_path / "memory")
    run_ranks(2, train_with_a_slow_rank, on_layout(straggler_config, pp=2).resolved(2), "memory")
    line = records(tmp_path / "memory")[-1]
    assert line["memory_gib"]["now"] > without["memory_gib"]["now"] + 0.2  # a quarter GiB, on the second rank only
    assert line["memory_gib"]["peak"] >= line["memory_gib"]["now"]
    assert "straggler" not in line and "mfu" not in line and line["tflops"]["total"] > 0
