"""Models of Transformer Engine's modules: names and shapes, and whole runs in which a stand-in computes for them.

Needs the package transformer-engine (which no CPU machine needs otherwise), but no GPU: `engine_on_cpu.py`. It has to
be importable: where it does not find libnccl.so.2, LD_LIBRARY_PATH has to name the lib folders of the pip packages
nvidia/cu13, cudnn, nccl and nvshmem. Takes seven minutes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_teachers import WRITERS, _sizes, _write
from megatron_lrc.config import Config

#: By its metadata: in a process without a GPU megatron_lrc hides the module.
IS_INSTALLED = any(found.name == "transformer_engine" for found in distributions())
pytestmark = pytest.mark.skipif(not IS_INSTALLED, reason="the package transformer-engine is not installed")

TESTS = Path(__file__).resolve().parents[1]
LOCAL, ENGINE = "local", "transformer_engine"
LINEARS = ["TELayerNormColumnParallelLinear", "TERowParallelLinear"]


def run_case(name: str, ranks: int = 1, **arguments: Any) -> Any:
    """A function of engine_cases.py in processes of its own: what it returns on the first rank."""
    path = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    process = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(TESTS / "engine_on_cpu.py"), name, json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return json.loads(process.stdout.rpartition("result:")[2])


@pytest.mark.parametrize("write", WRITERS)
def test_both_layer_specs_have_the_same_parameters_by_the_same_names(tmp_path: Path, write: Callable) -> None:
    write(tmp_path)
    found = run_case("names", teacher=str(tmp_path))
    assert found[ENGINE] == found[LOCAL]
    assert found[f"{ENGINE} modules"] == LINEARS and found[f"{LOCAL} modules"] == []
    assert len(found[LOCAL]["pairs"]) == 2 * 7 + 2 and found[LOCAL]["hooks"] == [1] * 8


@pytest.mark.parametrize("write", WRITERS)
def test_a_teacher_and_the_student_composed_of_it_are_the_same_with_either_spec(
    tmp_path: Path, write: Callable
) -> None:
    write(tmp_path)
    assert set(run_case("values", teacher=str(tmp_path)).values()) == {True}


def test_modules_are_set_up_as_the_flags_say(tmp_path: Path) -> None:
    WRITERS[-1](tmp_path)
    found = run_case("construction", teacher=str(tmp_path))
    off = {"teacher": [False], "student": [False]}
    assert found["epsilons"] == [3e-5]
    assert found["fused"] == {"teacher": [False], "student": [True]}
    assert found["fused when told not to"] == found["fused in fp32"] == off
    assert found["attention"] == "TEDotProductAttention"
    others = {value for name, value in found.items() if name.startswith("attention") and name != "attention"}
    assert others == {"ScaledDotProductAttention"}


def test_userbuffers_are_the_students_and_of_its_width(tmp_path: Path) -> None:
    WRITERS[-1](tmp_path)
    found = run_case("userbuffers", ranks=2, teacher=str(tmp_path))
    assert found["buffers"] == [[[16, 32], "torch.bfloat16"]]
    assert found["teacher"] == ["None: "]
    columns, rows = "overlap_ag_fprop, bulk_dgrad, bulk_wgrad", "overlap_rs_fprop, overlap_ag_dgrad"
    assert found["student"] == [f"fc1: {columns}", f"fc2: {rows}", f"proj: {rows}", f"qkv: {columns}"]
    assert found["ended"]


# ------------------------------------------------------------------------------------------ runs, with the stand-in


@pytest.fixture
def engine_config(tiny_llama, tiny_text, tmp_path) -> Config:
    """Four steps of two micro-batches, validations between them."""
    config = Config()
    config.model.teacher, config.model.student_hidden_size = tiny_llama(), 32
    config.projection.init_method_std = 0.1
    config.training.seq_length, config.training.micro_batch_size, config.training.global_batch_size = 16, 2, 4
    config.training.train_iters, config.optimizer.lr_decay_iters, config.optimizer.lr = 4, 20, 1e-3
    config.training.bf16 = True
    config.data.data_path, config.data.split = [tiny_text], "90,10,0"
    config.logging.log_interval, config.logging.eval_iters, config.logging.eval_interval = 1, 1, 2
    config.checkpoint.save = str(tmp_path / "run")
    config.compute.transformer_impl, config.compute.attention_backend = ENGINE, "local"
    return config


def train(config: Config, run: Path | None = None, ranks: int = 1) -> tuple[list[dict], dict[str, int]]:
    """The records of all steps, and how often the first rank did each product and each quantisation."""
    if run:
        config = replace(config, checkpoint=replace(config.checkpoint, save=str(run)))
    counts = run_case("train", ranks, settings=config.to_dict())
    lines = (Path(str(config.checkpoint.save)) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], counts


def with_compute(config: Config, **settings: Any) -> Config:
    return replace(config, compute=replace(config.compute, **settings))


def measured(records: list[dict]) -> list[dict]:
    """What a record has of the model: losses and gradients, of training and of validations."""
    wanted = ("step", "loss", "lm_loss", "kl_loss", "clone_loss", "teacher_lm_loss", "grad_norm", "grad_norm_by_group")
    return [{key: record[key] for key in wanted if key in record} for record in records]


def assert_close(found: list[dict], expected: list[dict], rel: float) -> None:
    found, expected = measured(found), measured(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for key, value in other.items():
            assert one[key] == pytest.approx(value, rel=rel), (key, one, other)


@pytest.mark.parametrize("ordinary", [False, True], ids=["lrc", "ordinary"])
def test_gradients_that_products_add_to_main_grad_are_those_that_autograd_adds(
    engine_config, tmp_path, ordinary
) -> None:
    """Both are rounded to bf16 in other places. An overwritten or doubled micro-batch would be off by half."""
    if ordinary:
        engine_config.model.method, engine_config.model.student = "ordinary", engine_config.model.teacher
        engine_config.model.teacher = engine_config.model.student_hidden_size = None
        engine_config.projection.init_method_std = 0.02
    local, _ = train(with_compute(engine_config, transformer_impl=LOCAL), tmp_path / "local")
    fused, _ = train(engine_config, tmp_path / "fused")
    plain, _ = train(with_compute(engine_config, gradient_accumulation_fusion=False), tmp_path / "plain")
    assert_close(fused, local, rel=2e-2)
    assert_close(plain, local, rel=2e-2)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, "recompute_granularity": "full"},
    ],
    ids=["TP2+SP", "PP2x2-recompute"],
)
def test_every_layout_gives_what_one_process_gives(engine_config, tmp_path, layout) -> None:
    sizes = _sizes(num_layers=4, is_tied=False) | {"intermediate_size": 96}  # halves are multiples of 16
    _write(tmp_path / "teacher", LlamaForCausalLM, LlamaConfig(**sizes), dtype=torch.float32)
    engine_config.model.teacher, engine_config.training.global_batch_size = str(tmp_path / "teacher"), 8
    local, _ = train(with_compute(engine_config, transformer_impl=LOCAL), tmp_path / "local")
    for compute in ({}, {"fp8_format": "hybrid", "teacher_fp8": True}):
        one, _ = train(with_compute(engine_config, **compute), tmp_path / f"one{len(compute)}")
        split = replace(with_compute(engine_config, **compute), parallel=replace(engine_config.parallel, **layout))
        many, counts = train(split, tmp_path / f"many{len(compute)}", ranks=2)
        assert_close(many, one, rel=5e-2 if compute else 2e-2)
        assert_close(one, local, rel=0.2 if compute else 2e-2)
        rows = 128 // layout.get("tensor_model_parallel_size", 1)
        layers = 4 // layout.get("pipeline_model_parallel_size", 1)
        assert counts.get(f"quantised ({rows}, 32)", 0) == layers * (4 + 3) * bool(compute)
        assert counts.get(f"quantised ({rows}, 48)", 0) == layers * bool(compute)


def test_overlapped_sums_and_gathers_give_what_comes_without_them(engine_config, tmp_path) -> None:
    """A weight's gradient is complete when its hook is called, although the product has added it to `main_grad`."""
    engine_config.training.global_batch_size = 8
    engine_config.parallel.use_distributed_optimizer = True
    plain, _ = train(engine_config, tmp_path / "plain", ranks=2)
    overlap = replace(engine_config.parallel, overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=2000)
    overlapped, _ = train(replace(engine_config, parallel=overlap), tmp_path / "overlapped", ranks=2)
    assert_close(overlapped, plain, rel=1e-4)


@pytest.mark.parametrize("recompute", [None, "full", "mlp"])
def test_a_student_is_quantised_once_a_step_and_its_teacher_once(engine_config, tmp_path, recompute) -> None:
    if recompute:
        engine_config.parallel.recompute_granularity = "full" if recompute == "full" else "selective"
        engine_config.parallel.recompute_modules = ["mlp"] if recompute == "mlp" else ["core_attn"]
    fp8 = with_compute(engine_config, fp8_format="hybrid")
    only_student, counts = train(fp8, tmp_path / "student")
    of_student, of_teacher = "(128, 32)", "(128, 48)"  # the shapes of linear_qkv in the two models' two layers
    times = 4 + 3  # steps and validations: at 0, 2 and 4
    assert counts[f"quantised {of_student}"] == 2 * times
    assert f"bf16 product {of_student}" not in counts
    assert f"fp8 product {of_teacher}" not in counts  # not even where it is recomputed inside the student's pass
    both, counts = train(with_compute(fp8, teacher_fp8=True), tmp_path / "both")
    assert counts[f"quantised {of_student}"] == 2 * times and counts[f"quantised {of_teacher}"] == 2
    assert f"bf16 product {of_teacher}" not in counts
    bf16, _ = train(engine_config, tmp_path / "bf16")
    assert_close(only_student, bf16, rel=0.2)
    assert_close(both, bf16, rel=0.2)
    assert measured(only_student) != measured(bf16) != measured(both)


def test_layers_at_the_ends_stay_in_bf16(engine_config) -> None:
    _, counts = train(
        with_compute(engine_config, fp8_format="e4m3", first_last_layers_bf16=True, num_layers_at_end_in_bf16=0)
    )
    assert counts["bf16 product (128, 32)"] == counts["fp8 product (128, 32)"]


def test_the_teachers_attention_output_is_computed_in_the_teachers_precision(engine_config) -> None:
    engine_config.loss.clone_attention_output = "teacher"
    _, counts = train(with_compute(engine_config, fp8_format="e4m3"))
    assert "fp8 product (48, 64)" not in counts and counts["bf16 product (48, 64)"] > counts["bf16 product (128, 48)"]


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_a_run_in_fp8_goes_on_from_its_checkpoint_bit_for_bit(engine_config, tmp_path, recipe) -> None:
    config = with_compute(engine_config, fp8_format="e4m3", fp8_recipe=recipe)
    if recipe == "delayed":
        config = with_compute(config, fp8_amax_history_len=3, fp8_amax_compute_algo="max")
    whole, _ = train(config, tmp_path / "whole")
    first = replace(config, training=replace(config.training, train_iters=2))
    first.checkpoint.save = str(tmp_path / "parts")
    train(first)
    second = replace(config, checkpoint=replace(first.checkpoint, load=first.checkpoint.save))
    parts, _ = train(second)
    assert measured(parts) == measured(whole)


def test_a_validation_leaves_the_scales_of_delayed_scaling_as_they_were(engine_config, tmp_path) -> None:
    config = with_compute(engine_config, fp8_format="e4m3", fp8_recipe="delayed", fp8_amax_history_len=4)
    config.compute.fp8_amax_compute_algo = "max"
    validated, _ = train(config, tmp_path / "validated")
    config.logging.eval_iters = 0
    alone, _ = train(config, tmp_path / "alone")
    assert measured([record for record in validated if "grad_norm" in record]) == measured(alone)


def test_a_run_goes_from_one_layer_spec_to_the_other_and_back(engine_config, tmp_path) -> None:
    """Checkpoints have the same keys: the loss goes on as it would have."""
    whole, _ = train(with_compute(engine_config, transformer_impl=LOCAL), tmp_path / "whole")
    run = replace(engine_config.checkpoint, save=str(tmp_path / "run"))
    parts: list[dict] = []
    for steps, impl in ((1, LOCAL), (3, ENGINE), (4, LOCAL)):
        part = with_compute(engine_config, transformer_impl=impl)
        training = replace(engine_config.training, train_iters=steps)
        parts, _ = train(replace(part, training=training, checkpoint=replace(run, load="auto")))
    last = [records[-2] for records in (parts, whole)]  # a validation follows
    assert_close(last[:1], last[1:], rel=2e-2)
