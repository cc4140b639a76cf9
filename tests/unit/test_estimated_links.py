"""Communication between replicas by hand: what adapters a group has, and what the overlap flags hide."""

import pytest

from megatron_lrc.config import parse_config
from megatron_lrc.estimate.communication import traffic
from megatron_lrc.estimate.devices import GPUS
from megatron_lrc.estimate.flops import step_flops
from megatron_lrc.estimate.links import LINK_EFFICIENCY, ring_speed
from megatron_lrc.estimate.published_teachers import TEACHER_SHAPES
from megatron_lrc.estimate.search import find_plans
from megatron_lrc.estimate.speed import StepTime, step_time
from megatron_lrc.estimate.stage import stages_of
from megatron_lrc.methods import method_of

H100, A100 = GPUS["H100-80GB"], GPUS["A100-80GB"]
TEACHER = TEACHER_SHAPES["Llama-3.2-3B-Instruct"]
FLAGS = "--preset lrc-1.5b --micro-batch-size 3"


@pytest.mark.parametrize(
    ("num_ranks", "stride", "gpu", "gigabytes"),
    [
        (8, 1, H100, 450),  # NVLink
        (2, 4, H100, 450),
        (16, 1, H100, 400),  # eight ranks of a node, eight adapters of 50
        (64, 1, H100, 400),
        (64, 1, A100, 300),  # whose NVLink is slower than that
        (32, 2, H100, 200),  # TP 2: a node holds four ranks of each group
        (4, 4, H100, 100),
        (8, 8, H100, 50),  # TP 8: one
        (12, 1, H100, 200),  # eight in one node, four in the other
    ],
)
def test_a_group_over_nodes_has_an_adapter_for_each_of_its_ranks_in_a_node(num_ranks, stride, gpu, gigabytes):
    assert ring_speed(num_ranks, stride, gpu) == pytest.approx(LINK_EFFICIENCY * gigabytes * 1e9)


def time_of(flags: str, world_size: int) -> tuple[StepTime, float, float]:
    """Of LRC-1.5B: the step, and bytes of gradients and parameters that a rank sends."""
    config = parse_config(f"{FLAGS} {flags}".split()).resolved(world_size)
    student = method_of(config).student_shape(TEACHER)
    time = step_time(config, TEACHER, student, world_size=world_size, gpu=H100, mfu=0.35)
    (stage,) = stages_of(config, TEACHER, student)
    sent = traffic(stage, world_size=world_size)
    return time, sent.gradients, sent.parameters


def test_gradients_of_sixteen_replicas_cross_nodes_through_eight_adapters():
    """28 layers of 7 P of 3072 x 1536 and the tied embedding's: 0.93e9 elements, 15/16 of them in 4 and 2 bytes."""
    time, gradients, parameters = time_of("--global-batch-size 48", 16)
    elements = (28 * 7 + 1) * 3072 * 1536 + 57 * 1536
    assert (gradients, parameters) == (elements * 4 * 15 / 16, elements * 2 * 15 / 16)
    assert time.communication == pytest.approx((gradients + parameters) / (0.7 * 400e9))
    assert time.communication == pytest.approx(0.0187, abs=1e-4) and time.overlapped == 0


def test_overlap_hides_sums_but_the_last_bucket_and_gathers():
    """At 0.35 of 989 TFLOP/s the last backward pass (6,144 tokens of 6.6 GFLOP and more) takes 0.12 s, the teacher's
    first pass 0.12 s: both longer than the 0.012 s and 0.006 s that are exchanged meanwhile."""
    plain, gradients, parameters = time_of("--global-batch-size 48", 16)
    sums, _, _ = time_of("--global-batch-size 48 --overlap-grad-reduce", 16)
    both, _, _ = time_of("--global-batch-size 48 --overlap-grad-reduce --overlap-param-gather", 16)
    speed, last = 0.7 * 400e9, 40_000_000 * 4 * 15 / 16
    assert sums.communication == pytest.approx((last + parameters) / speed)
    assert both.communication == pytest.approx(last / speed)
    assert both.overlapped == pytest.approx((gradients - last + parameters) / speed)
    assert plain.total - both.total == pytest.approx(both.overlapped)


def test_what_is_longer_than_the_computation_is_waited_for():
    """TP 8: one adapter a group. Micro-batches of 128 tokens, so that little is computed beside."""
    flags = "--tensor-model-parallel-size 8 --global-batch-size 2 --seq-length 128 --micro-batch-size 1"
    plain, gradients, _ = time_of(flags, 16)
    overlapped, _, _ = time_of(f"{flags} --overlap-grad-reduce", 16)
    config = parse_config(f"{FLAGS} {flags}".split()).resolved(16)
    flops = step_flops(config, TEACHER, method_of(config).student_shape(TEACHER), replicas=2)
    beside = (flops.student_backward + flops.projections / 2) / 16 / (0.35 * 989.4e12)
    assert beside < gradients / (0.7 * 50e9)
    assert plain.communication - overlapped.communication == pytest.approx(beside)
    assert overlapped.overlapped == pytest.approx(beside)


def test_the_plan_overlaps_over_nodes_and_says_so_in_its_flags():
    config = parse_config(f"{FLAGS} --global-batch-size 192".split())
    student = method_of(config).student_shape(TEACHER)
    best, *_ = find_plans(config, TEACHER, student, world_size=64, gpu=H100, mfu=0.35, micro_batches=(3,))
    assert best.flags().endswith("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather")
    assert best.time.communication / best.time.total < 0.02
    within, *_ = find_plans(config, TEACHER, student, world_size=8, gpu=H100, mfu=0.35, micro_batches=(3,))
    assert "overlap" not in within.flags()
