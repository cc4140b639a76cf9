"""--share-compose by hand: who composes what, what travels between replicas, and what a published run gains."""

import pytest

from megatron_lrc.clone.sharing import divide
from megatron_lrc.config import ConfigError, parse_config, validate
from megatron_lrc.estimate.communication import Traffic, sharing_replicas, traffic
from megatron_lrc.estimate.devices import GPUS
from megatron_lrc.estimate.flops import step_flops
from megatron_lrc.estimate.plan_lines import describe_sharing
from megatron_lrc.estimate.published_teachers import TEACHER_SHAPES
from megatron_lrc.estimate.speed import StepTime, step_time
from megatron_lrc.estimate.stage import Stage, stages_of
from megatron_lrc.methods import method_of

H100, TEACHER = GPUS["H100-80GB"], TEACHER_SHAPES["Llama-3.2-3B-Instruct"]
#: The student's composed matrices: of 28 layers q, k, v, o and three of the FFN, and the tied embedding's.
ELEMENTS = 1536 * (28 * (3072 + 2 * 1024 + 3072 + 3 * 8192) + 128256)


def stage_of(flags: str, world_size: int = 8) -> Stage:
    config = parse_config(f"--preset lrc-1.5b {flags}".split()).resolved(world_size)
    stage, *_ = stages_of(config, TEACHER, method_of(config).student_shape(TEACHER))
    return stage


def predicted(flags: str, world_size: int = 8) -> tuple[StepTime, Traffic]:
    stage = stage_of(flags, world_size)
    time = step_time(stage.config, TEACHER, stage.student, world_size=world_size, gpu=H100, mfu=0.35)
    return time, traffic(stage, world_size=world_size)


def test_the_largest_matrix_goes_to_who_has_least():
    assert divide([5, 9, 4, 4, 4], 2) == [1, 0, 1, 0, 1]
    assert divide([1, 1, 1], 3) == [0, 1, 2] and divide([7, 7], 4) == [0, 1]
    assert divide([3, 2], 1) == [0, 0] and divide([], 2) == []


def test_eight_replicas_of_a_published_run_have_an_eighth_each():
    stage = stage_of("")
    assert stage.composed_elements == ELEMENTS and [len(chunk) for chunk in stage.composed] == [28 * 4 + 1]
    assert stage.largest_share(1) == 1 and 1 / 8 <= stage.largest_share(8) < 0.126
    assert stage_of("--open-after 0 --open-matrices all").composed_elements == 0


@pytest.mark.parametrize(
    "flags, world_size, replicas",
    [
        ("", 8, 8),
        ("--global-batch-size 48", 16, 8),
        ("--global-batch-size 36", 12, 4),  # the second node has four
        ("--tensor-model-parallel-size 2", 16, 4),
        ("--tensor-model-parallel-size 8", 16, 1),
        ("--context-parallel-size 2", 8, 8),
        ("--pipeline-model-parallel-size 2", 8, 4),
    ],
)
def test_replicas_of_a_node_share(flags, world_size, replicas):
    config = parse_config(f"--preset lrc-1.5b {flags} --share-compose".split()).resolved(world_size)
    assert sharing_replicas(config, world_size) == replicas
    config.parallel.share_compose = False
    assert sharing_replicas(config, world_size) == 1


def test_a_step_loses_seven_eighths_of_its_products_and_waits_for_gradients():
    """4 FLOPs for each of 3.2e9 elements of the teacher's and 1536 columns: 57 ms at 0.35 of 989 TFLOP/s. W_S travels
    beside the teacher's first pass (0.12 s), dW_S beside nothing."""
    (plain, without), (shared, sent) = predicted(""), predicted("--share-compose")
    assert (without.composed, without.composed_gradients) == (0, 0)
    assert (sent.composed, sent.composed_gradients) == (2 * ELEMENTS, 4 * ELEMENTS)
    assert sent.data == without.data
    products = 4 * 2 * ELEMENTS * 1536 / (0.35 * 989.4e12)  # the teacher's matrices are twice as large
    assert products == pytest.approx(0.057, abs=1e-4)
    assert plain.compute - shared.compute == pytest.approx(7 / 8 * products, rel=1e-3)
    assert shared.communication - plain.communication == pytest.approx(4 * ELEMENTS / (0.7 * 450e9))
    assert shared.overlapped - plain.overlapped == pytest.approx(2 * ELEMENTS / (0.7 * 450e9))
    assert plain.total / shared.total > 1.07


def test_with_overlapped_sums_it_waits_for_the_last_layer_only():
    plain, _ = predicted("--overlap-grad-reduce")
    shared, _ = predicted("--overlap-grad-reduce --share-compose")
    assert shared.communication - plain.communication == pytest.approx(4 * ELEMENTS / 28 / (0.7 * 450e9))
    assert plain.total / shared.total > 1.13


def test_matrices_that_are_composed_behind_the_teacher_travel_beside_the_students_pass():
    """Micro-batches of 256 tokens, so that neither pass is as long as the 10 ms that matrices take, but longer than
    the 5 ms of P, which are gathered beside the teacher's alone."""
    flags = "--share-compose --seq-length 256 --micro-batch-size 1 --overlap-grad-reduce"
    (before, _), (behind, sent) = predicted(flags), predicted(f"{flags} --overlap-param-gather")
    stage = stage_of(flags)
    flops = step_flops(stage.config, TEACHER, stage.student)
    teacher, student = (work / 3 / 8 / (0.35 * 989.4e12) for work in (flops.teacher_forward, flops.student_forward))
    gathers, matrices = (volume / (0.7 * 450e9) for volume in (sent.parameters, sent.composed))
    assert student < teacher < gathers < teacher + before.compute and teacher < matrices
    assert behind.communication - before.communication == pytest.approx(teacher - student - gathers)


def test_the_dry_run_says_what_it_does_or_would_do():
    def lines(flags: str, world_size: int = 8) -> list[str]:
        stage = stage_of(flags, world_size)
        sizes = {"world_size": world_size, "gpu": H100, "mfu": 0.35}
        return list(describe_sharing(stage.config, TEACHER, stage.student, **sizes))

    said = "--share-compose, for the 8 replicas of a node: a step {} 381 ms instead of 411 (7.7% faster), 36 ms of it "
    (would,), (does,) = lines(""), lines("--share-compose")
    assert would == said.format("would take") + "waiting for communication instead of 15"
    assert does == said.format("takes") + "waiting for communication instead of 15"
    assert lines("--tensor-model-parallel-size 8") == []
    assert "does nothing here" in lines("--tensor-model-parallel-size 8 --share-compose")[0]
    assert lines("--open-after 0 --open-matrices all") == []


@pytest.mark.parametrize("method", ["ordinary", "logits", "tinybert", "sheared"])
def test_methods_that_compose_nothing_refuse_the_flag(method):
    with pytest.raises(ConfigError, match=rf"--share-compose cannot go with --method {method}, which"):
        validate(method_of(parse_config(["--method", method, "--share-compose"])))
