"""Whatever a cluster does to a run: it goes on from its newest good checkpoint and comes out the same (`chaos.py`)."""

import random

import pytest

from chaos import SHORT, Chaos, many_runs, plan, table
from disturbances import KINDS


@pytest.mark.slow
@pytest.mark.distributed
def test_disturbed_runs_come_out_bit_for_bit_like_undisturbed_ones(tiny_llama, tiny_text, tmp_path):
    chaos = Chaos(tmp_path, tiny_llama(), tiny_text, seed=1)
    for scenario, kinds in zip(SHORT, (list(KINDS)[0::2], list(KINDS)[1::2]), strict=True):
        chaos.disturb(scenario, plan(random.Random(1), kinds))
    print(table(chaos.events))
    assert len(chaos.events) >= 6


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2])
def test_after_fifty_disturbances_and_one_of_each_kind_through_torchrun(tmp_path, seed):
    chaos, printed = many_runs(tmp_path, kills=50, seed=seed, with_torchrun=True, say=print)
    print(printed)
    assert len(chaos.events) >= 60
    assert {event.kind for event in chaos.events if event.scenario.is_launched} == set(KINDS)
