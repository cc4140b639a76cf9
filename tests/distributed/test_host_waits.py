"""A step enqueues all its micro-batches without waiting: what waits is read at its end, once."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from built_stages import build_stages
from gradient_cases import Layout, Sizes, Variant, gradient_config, own_micro_batches
from host_waits import HostWaits
from megatron_lrc.clone.initialization import initialize_random
from megatron_lrc.config import Config
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.teacher import TeacherReader
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.optimizer import build_optimizer
from megatron_lrc.methods import method_of
from megatron_lrc.methods.lrc.calibration import calibrate_losses
from megatron_lrc.train import step
from ranks import run_ranks

PACKED = Sizes(vocab=10, eod=3)
ALL = Variant(normalization="token", reset_attention=True, reset_positions=True)
#: Numbers that are on the CPU in a run on CUDA too, or that only a CPU looks at.
NOT_ON_CUDA = {
    "lift_fresh: pipeline_parallel/schedules.py:forward_step_calc_loss",  # megatron-core's zero of a stage's tokens
    "_local_scalar_dense: clone/vocab_parallel.py:backward",  # whether to scale at all, which CUDA always does
}


def waits_of_a_step(config: Config) -> tuple[dict[str, int], dict[str, int]]:
    """On a rank, in its second step, when what is made once has been made: the waits until the pull back has been
    enqueued, and in the whole step."""
    groups = distributed.start(config)
    teacher = describe_teacher(config.model.teacher)
    stages = build_stages(config, teacher, TeacherReader(teacher), groups, torch.float32)
    for stage in stages:
        initialize_random(stage.projections, std=0.1, seed=1)
    calibrate_losses(config, stages, lambda: own_micro_batches(config, groups, PACKED))
    optimizer = build_optimizer(config, stages, groups)
    run = step.Run(method_of(config), groups, stages, optimizer, config.num_microbatches(distributed.world_size()))
    step.train_step(run, own_micro_batches(config, groups, PACKED))
    enqueued: list[str] = []
    batches = iter([*own_micro_batches(config, groups, PACKED)])
    pull_back = run.pull_back

    def look(self: step.Run) -> None:
        pull_back()
        enqueued.extend(waits.found)

    step.Run.pull_back = look  # type: ignore[method-assign]
    with HostWaits() as waits:
        step.train_step(run, batches)
    return dict(Counter(enqueued)), dict(Counter(waits.found))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [Layout(cp=2, micro=12, recompute="full"), Layout(pp=2, micro=12)],
    ids=str,
)
def test_nothing_waits_before_all_micro_batches_are_enqueued(tiny_llama, layout):
    config = gradient_config(
        tiny_llama(num_layers=4, vocab_size=96), layout, untie=True, variant=ALL, sizes=replace(PACKED, batch=24)
    )
    for until_pull_back, whole in run_ranks(layout.world, waits_of_a_step, config):
        print(until_pull_back.keys() - NOT_ON_CUDA, whole)
        assert until_pull_back.keys() <= NOT_ON_CUDA
