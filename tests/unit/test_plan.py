"""tools/plan.py finds layouts that a run accepts and that fit, the fastest first, and says so when there is none."""

import json
import re

import pytest

from full_size_teachers import write_full_size_teacher
from megatron_lrc.config import PUBLISHED_RUNS, Config, parse_config, validate, validate_against_teacher
from megatron_lrc.estimate.devices import GIB, GPUS, gpu_named
from megatron_lrc.estimate.peak_memory import peak_memory
from megatron_lrc.estimate.plan_lines import compare_with_next, describe_batch
from megatron_lrc.estimate.published_teachers import TEACHER_SHAPES
from megatron_lrc.estimate.search import Plan, candidates, find_plans, larger_batch
from megatron_lrc.estimate.speed import step_time
from megatron_lrc.methods import method_of
from tools_path import tool_main

plan_main = tool_main("plan")
TEACHER = TEACHER_SHAPES["Qwen2.5-7B-Instruct"]


def published(*flags: str) -> Config:
    return parse_config(["--preset", "lrc-4b", *flags])


def plans_of(config: Config, gpus: int, gpu: str = "H100-80GB") -> list[Plan]:
    student = method_of(config).student_shape(TEACHER)
    return find_plans(config, TEACHER, student, world_size=gpus, gpu=gpu_named(gpu), mfu=0.35)


def test_every_layout_found_is_one_that_a_run_accepts(tmp_path):
    teacher = write_full_size_teacher("Qwen2.5-7B-Instruct", tmp_path / "teacher")
    common = ["--teacher", teacher, "--data-path", "unused", "--save", str(tmp_path / "run")]
    plans = plans_of(published("--global-batch-size", "48"), 24)
    assert len({plan.flags() for plan in plans}) == len(plans) > 100
    for plan in plans:
        config = published(*common, "--global-batch-size", "48", *plan.flags().split())
        validate(method_of(config), world_size=24)
        validate_against_teacher(method_of(config), TEACHER)
        assert config.parallel == plan.config.parallel and config.resolved(24).training == plan.config.training


def test_layouts_fit_and_the_fastest_comes_first():
    plans = plans_of(published(), 8)
    assert all(plan.memory.total <= GPUS["H100-80GB"].memory for plan in plans)
    speeds = [float(f"{plan.time.tokens_per_second:.2g}") for plan in plans]
    assert speeds == sorted(speeds, reverse=True) and speeds[0] > 2 * speeds[-1]
    smaller = plans_of(published(), 8, "A100-40GB")
    assert 0 < len(smaller) < len(plans)
    assert smaller[0].config.model_parallel_size > 1, "a whole model does not fit into 40 GB"


def test_recomputation_saves_memory_and_costs_time():
    plans = {plan.flags(): plan for plan in plans_of(published(), 8)}
    plain = next(plan for flags, plan in plans.items() if "recompute" not in flags and "tensor" in flags)
    again = plans[plain.flags().replace(" --use-", " --recompute-granularity full --use-")]
    assert again.memory.total < plain.memory.total and again.time.total > 1.2 * plain.time.total


@pytest.mark.parametrize("stages", [2, 4, 7])
def test_the_bubble_is_that_of_1f1b(stages):
    """(p - 1) of m + p - 1 slots, where every stage has the same work: no LM head to speak of."""
    shape = TEACHER_SHAPES["Llama-2-7b-chat"]
    shape = type(shape)(
        **{name: getattr(shape, name) for name in shape.__slots__} | {"vocab_size": 128, "num_layers": 28}
    )
    sizes = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", str(stages)]
    config = published(*sizes, "--micro-batch-size", "1", "--global-batch-size", "16")
    student, gpu = method_of(config).student_shape(shape), GPUS["H100-80GB"]
    time = step_time(config.resolved(stages), shape, student, world_size=stages, gpu=gpu, mfu=0.35)
    expected = (stages - 1) / (16 + stages - 1)
    assert time.bubble / (time.compute + time.bubble) == pytest.approx(expected, rel=0.06)  # composing has no bubble


def test_a_pipeline_stage_holds_less_and_the_first_has_the_most_micro_batches():
    config = published("--pipeline-model-parallel-size", "4").resolved(8)
    peaks = peak_memory(config, TEACHER, method_of(config).student_shape(TEACHER), world_size=8)
    whole = peak_memory(published().resolved(8), TEACHER, method_of(config).student_shape(TEACHER), world_size=8)
    assert len(peaks) == 4 and max(peak.total for peak in peaks) < whole[0].total
    activations = [peak.activations for peak in peaks]
    assert activations == sorted(activations, reverse=True)


def test_the_search_covers_every_kind_of_split():
    found = list(candidates(published("--global-batch-size", "16"), TEACHER, 8))
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        assert {getattr(config.parallel, name) for config in found} >= {1, 2, 4}, name
    assert {config.parallel.recompute_granularity for config in found} == {None, "selective", "full"}
    assert {config.training.micro_batch_size for config in found} >= {1, 2, 4}


@pytest.mark.parametrize("preset", PUBLISHED_RUNS)
def test_the_tool_plans_a_published_run_without_its_teacher(capsys, preset):
    assert plan_main(["--gpus", "8", "--preset", preset, "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "layouts fit on 8 x H100-80GB" in lines[0] and lines[1].startswith("TP PP CP  DP")
    assert "hours    days" in lines[1] and not any("warning" in line or "limits" in line for line in lines[2:])
    assert f"training: {PUBLISHED_RUNS[preset][1]} tokens in " in lines[7]
    assert lines[8].startswith("learning rate: ") and " steps of warmup, then linear decay to 0 at step " in lines[8]
    assert lines[9].startswith("against the second, the first is ") and len(lines) == 11
    assert "--share-compose, for the " in lines[10] and " replicas of a node: a step would take " in lines[10]


def test_the_tool_says_what_another_batch_makes_of_a_preset(capsys):
    assert plan_main(["--gpus", "64", "--preset", "lrc-4b", "--global-batch-size", "256", "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    hours = float(lines[2].split()[-2])
    assert lines[5] == (
        f"training: 18B tokens in 34,333 steps of 524,288 tokens; {hours:.1f} hours with the first layout"
    )
    assert lines[7] == (
        "warning: --global-batch-size 256 where lrc-4b has 16: 34,333 steps instead of 549,317; the --lr 0.0001 of "
        "lrc-4b was published for a batch of 16"
    )
    assert float(lines[2].split()[-4].rstrip("%")) < 30 and "limits" not in "".join(lines)


def test_a_plan_without_a_budget_has_no_hours():
    """Nor need it know in which step a clone is opened."""
    flags = "--student-hidden-size 2048 --bf16 --global-batch-size 2 --open-after 0.1"
    config = parse_config(flags.split()).resolved(2)
    student, gpu = method_of(config).student_shape(TEACHER), gpu_named("H200-141GB")
    plan = find_plans(config, TEACHER, student, world_size=2, gpu=gpu, mfu=0.35)[0]
    assert plan.hours is None and plan.numbers()["days"] is None


def test_where_the_batch_limits_a_larger_one_is_proposed_with_its_gain():
    student, gpu = method_of(published()).student_shape(TEACHER), gpu_named("H100-80GB")
    plans = plans_of(published(), 64)
    larger = larger_batch(plans[0], TEACHER, student, gpu=gpu, mfu=0.35)
    assert larger is not None and larger.hours is not None and plans[0].hours is not None
    (line,) = describe_batch(plans[0], larger)
    found = re.fullmatch(
        r"the batch limits: --global-batch-size 16 makes (\d+) micro-batches for (\d+) pipeline stages, which wait "
        r"(\d+)% of the time\. --global-batch-size (\d+) would be (\d+)% faster \((\d+) tokens/s, ([\d.]+) hours\) "
        r"with (.+)",
        line,
    )
    assert found, line
    batch, gain = int(found[4]), int(found[5])
    best = plans_of(published("--global-batch-size", str(batch)), 64)[0]
    assert round(best.time.tokens_per_second) == int(found[6]) and found[8] == larger.flags()
    assert gain == round(100 * (best.time.tokens_per_second / plans[0].time.tokens_per_second - 1)) >= 5
    assert larger.hours == pytest.approx(plans[0].hours / (1 + gain / 100), rel=0.02)
    roomy = plans_of(published(), 8)[0]
    assert larger_batch(roomy, TEACHER, student, gpu=gpu, mfu=0.35) is None and not list(describe_batch(roomy, None))


def test_the_first_layout_is_compared_with_the_second():
    plans = plans_of(published(), 32)
    (line,) = compare_with_next(plans)
    assert line.endswith(f"the second is {plans[1].flags()}")
    faster = plans[0].time.tokens_per_second / plans[1].time.tokens_per_second - 1
    less = (plans[1].memory.total - plans[0].memory.total) / GIB
    assert f"the first is {faster:.1%} faster and takes {less:.1f} GiB less per GPU" in line
    assert not list(compare_with_next(plans[:1]))


def test_the_tool_reads_a_config_file_alone_and_writes_json(capsys, tmp_path):
    teacher = write_full_size_teacher("Llama-3.2-3B-Instruct", tmp_path / "teacher")
    (tmp_path / "teacher/model.safetensors").unlink()
    flags = ["--teacher", teacher, "--student-hidden-size", "1536", "--bf16", "--train-iters", "1000"]
    assert plan_main(["--gpus", "4", "--gpu", "H200-141GB", *flags, "--json", "--top", "2"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["tokens_per_second"] >= 0.95 * second["tokens_per_second"]
    assert (first["steps"], first["tokens"]) == (1000, 1000 * first["step_seconds"]["tokens"])
    assert first["hours"] == pytest.approx(1000 * first["step_seconds"]["total"] / 3600)
    parts = first["memory_bytes"]
    assert parts.pop("total") == pytest.approx(sum(parts.values())) and parts["teacher"] > 5 * GIB


UNPLANNED = ("ordinary", "tinybert", "sheared")


def test_what_cannot_be_planned_is_refused_in_one_sentence(capsys, tmp_path):
    for flags, expected in (
        (["--student-hidden-size", "8"], "plan.py: Give --teacher DIR (config.json is enough), or --preset lrc-1.5b, "),
        (["--teacher", str(tmp_path)], "plan.py: --student-hidden-size is missing"),
        *((["--preset", "lrc-4b", "--method", name], f"plan.py: --method {name}: its memory") for name in UNPLANNED),
        (["--preset", "lrc-4b", "--student-layers", "0", "x"], "plan.py: --student-layers 0 x: invalid literal"),
        (["--preset", "lrc-4b", "--student-num-layers", "99"], "plan.py: --student-num-layers 99 is above the"),
        (["--preset", "lrc-4b", "--mfu", "35"], "plan.py: --mfu 35.0 is not a share"),
        (["--preset", "lrc-4b", "--gpu", "H1"], "plan.py: --gpu H1 is not known"),
        (["--preset", "lrc-4b", "--micro-batch", "7"], "plan.py: unknown flag --micro-batch"),
        (["--preset", "lrc-4b", "--seq-length", "262144"], "plan.py: No layout of 2 GPUs fits into the 79.1 GiB"),
    ):
        code = plan_main(["--gpus", "2", *flags])
        error = capsys.readouterr().err
        assert code == 2 and error.startswith(expected) and error.count("\n") == 1, (flags, error)
    assert plan_main(["--gpus", "13", "--preset", "lrc-4b"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("plan.py: No layout of 13 GPUs goes with --global-batch-size 16")
    assert "Use --global-batch-size 13 (676,082 steps) or 26 (338,041 steps), instead of 549,317 steps." in error
