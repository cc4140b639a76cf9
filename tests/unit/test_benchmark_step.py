"""tools/benchmark.py step: its ratios follow from what was measured, and contestants that differ are told apart."""

import json
import platform
import re
from argparse import ArgumentParser
from statistics import median

import psutil
import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import methods_benchmark as methods
from benchmarks import step_benchmark as step
from benchmarks.bare_products import BareProducts, products_of
from benchmarks.breakdown import PARTS
from benchmarks.measured_models import add_teacher_flags, open_base
from hf_teachers import WRITERS
from megatron_lrc.estimate.published_teachers import TEACHER_SHAPES
from megatron_lrc.mcore.optimizer import StageOptimizer
from megatron_lrc.methods import METHODS
from naive_variants import (
    Ending,
    Failing,
    InAThread,
    NoValueTerm,
    OtherAlpha,
    Telling,
    WithoutMemory,
    mapped_for_a_large_block,
)
from tools_path import load_tool

benchmark = load_tool("benchmark").main
SIZES = ["--student-hidden-size", "24", "--seq-length", "16", "--num-microbatches", "2", "--repeats", "1"]


@pytest.fixture(autouse=True)
def small_gemm(monkeypatch):
    monkeypatch.setattr(step, "_gemm_size", lambda device: 64)


@pytest.fixture
def in_a_thread(monkeypatch):
    monkeypatch.setattr(step, "NaiveProcess", InAThread)


def row_of(out: str, name: str) -> str:
    (row,) = re.findall(rf"^{re.escape(name)}  .*$", out, re.M)
    return row


def test_the_table_and_the_json_agree(tiny_llama, tmp_path, capsys, monkeypatch):
    """Ratios are medians over rounds of the seconds in the file; a profile's parts are there and add up. Whatever is
    measured divides its gradients by the tokens."""
    counted, reduce = set(), StageOptimizer.reduce_gradients

    def count(optimizer, tokens):
        counted.add((optimizer.kind, tokens.item()))
        reduce(optimizer, tokens)

    monkeypatch.setattr(StageOptimizer, "reduce_gradients", count)
    file = tmp_path / "figures.json"
    flags = ["--teacher", tiny_llama(is_tied=True), *SIZES, "--repeats", "3", "--profile", "--json", str(file)]
    assert benchmark(["step", *flags]) == 0
    out, figures = capsys.readouterr().out, json.loads(file.read_text())
    seconds = {name: each["seconds"] for name, each in figures["contestants"].items()}
    assert figures["tokens"] == 32 and all(len(each) == 3 for each in seconds.values())

    over = {
        name: [other / own for own, other in zip(seconds["lrc"], seconds[name], strict=True)]
        for name in ("ordinary", "naive")
    }
    assert f" {median(over['ordinary']):,.3f} (" in row_of(out, "LRC / ordinary")
    assert f" {median(over['naive']):,.2f} (" in row_of(out, "LRC / naive LRC (target: 1.5 or more)")
    shares = [ratio / figures["bound"] for ratio in over["ordinary"]]
    assert f" {median(shares):,.3f} (" in row_of(out, "measured / bound (target: 0.90 or more)")
    for name, own in seconds.items():
        row = row_of(out, step.NAMES[name])
        rates = zip(own, figures["gemm_flops_per_second"], strict=True)
        of_peak = median(figures["contestants"][name]["flops"] / each / peak for each, peak in rates)
        assert f" {median(32 / each for each in own):,.0f} (" in row and f" {of_peak:,.3f} (" in row
        bare = figures["contestants"][name]["product_seconds"]
        assert len(bare) == (0 if name == "naive" else 3)
        if bare:
            assert f" {median(alone / each for alone, each in zip(bare, own, strict=True)):,.3f} (" in row

    assert counted == {("torch's AdamW", 32)} and list(figures["profile"]) == list(PARTS)
    for name, values in figures["profile"].items():
        assert f" {median(values):,.3f} (" in row_of(out, name) and len(values) == 3
        assert name == "other" or min(values) > 0
    assert "they are the same method" in out and list(figures["differences"]) == [
        "LM",
        "KL",
        "clone terms",
        "gradient norm",
    ]


def test_products_are_done_again_as_they_were():
    """Each of them, in its layout and type, and nothing else."""
    left, right, total = torch.randn(4, 6), torch.randn(8, 6), torch.zeros(4, 8)

    def some_step():
        torch.addmm(total, left, right.t(), out=total)
        (left @ right.t()).exp().sum()
        torch.bmm(left.bfloat16()[None], right.t().bfloat16()[None])

    products = products_of(some_step)
    with FlopCounterMode(display=False) as counter:
        products.run()
    assert len(products) == 3 and counter.get_total_flops() == 3 * 2 * 4 * 6 * 8
    before = total.clone()
    products.run()
    assert torch.equal(total, before)  # not on the step's own tensors
    square = [torch.randn(4, 4) for _ in range(3)]
    (call,) = products_of(lambda: torch.mm(*square[:2], out=square[2]))._calls
    assert len({each.data_ptr() for each in tree_leaves(call[1:]) if isinstance(each, torch.Tensor)}) == 3
    with BareProducts() as again:
        products.run()
    assert (
        again.shapes
        == products.shapes
        == [
            [((4, 8), (8, 1)), ((4, 6), (6, 1)), ((6, 8), (1, 6)), ((4, 8), (8, 1))],
            [((4, 6), (6, 1)), ((6, 8), (1, 6))],
            [((1, 4, 6), (24, 6, 1)), ((1, 6, 8), (6, 1, 6))],
        ]
    )


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_the_naive_form_is_the_same_method_for_every_family(writer, in_a_thread, tmp_path, capsys):
    """A hidden size that is no multiple of the heads, too."""
    writer(tmp_path)
    flags = ["--teacher", str(tmp_path), *SIZES, "--student-hidden-size", "22", "--contestants", "lrc,naive"]
    assert benchmark(["step", *flags]) == 0
    assert "they are the same method" in capsys.readouterr().out


@pytest.mark.parametrize("naive", [OtherAlpha, NoValueTerm])
def test_a_naive_form_of_something_else_is_not_timed(naive, tiny_llama, in_a_thread, monkeypatch, capsys):
    monkeypatch.setattr(step, "NaiveClone", naive)
    assert benchmark(["step", "--teacher", tiny_llama(), *SIZES]) == 1
    out = capsys.readouterr().out
    assert "they are NOT the same method, so nothing is timed" in out and "tokens/s" not in out


def error_of(naive, teacher, monkeypatch, capsys) -> str:
    """What is said where the naive LRC is this form of it. One line, and nothing is timed."""
    monkeypatch.setattr(step, "NaiveClone", naive)
    capsys.readouterr()
    assert benchmark(["step", "--teacher", teacher, *SIZES, "--contestants", "lrc,naive"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "tokens/s" not in captured.out
    return captured.err


def test_naive_lrc_runs_with_the_settings_that_a_program_starts_with(tiny_llama, monkeypatch, capsys):
    """In a process with as many threads as ours, without megatron-core, where malloc maps large blocks one by one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(2)
    told = error_of(Telling, tiny_llama(), monkeypatch, capsys)
    assert "threads 2, megatron-core False" in told
    if platform.libc_ver()[0] == "glibc":
        assert "mapped True" in told
        assert not mapped_for_a_large_block()  # as ours does, or the process would not be needed


def test_what_fails_beside_us_is_one_sentence(tiny_llama, in_a_thread, monkeypatch, capsys):
    for naive, sentence in (
        (Failing, "benchmark.py: naive LRC failed: IndexError: list index out of range\n"),
        (WithoutMemory, "do not fit into the device's memory together (CUDA out of memory). Give fewer --contestants"),
    ):
        assert sentence in error_of(naive, tiny_llama(), monkeypatch, capsys)


def test_a_process_beside_us_that_ends_is_quoted(tiny_llama, monkeypatch, capsys):
    assert "The process of naive LRC ended with exit code 3: the last words. " in error_of(
        Ending, tiny_llama(), monkeypatch, capsys
    )


@pytest.mark.slow
def test_random_weights_are_the_same_in_both_processes(tiny_llama, capsys):
    """And the process ends when it is no longer needed."""
    before = set(psutil.Process().children())
    flags = ["--teacher-config", tiny_llama() + "/config.json", *SIZES, "--bf16", "--contestants", "lrc,naive"]
    assert benchmark(["step", *flags]) == 0
    out = capsys.readouterr().out
    assert "they are the same method" in out and "naive LRC has a process of its own, 1 threads as ours" in out
    assert set(psutil.Process().children()) <= before


def test_a_shape_without_weights_and_a_part_of_the_contestants(tiny_llama, capsys):
    """In bf16, and from config.json alone."""
    config = tiny_llama() + "/config.json"
    flags = ["--teacher-config", config, *SIZES, "--bf16", "--contestants", "ordinary,lrc", "--micro-batch-size", "2"]
    assert benchmark(["step", *flags]) == 0
    out = capsys.readouterr().out
    assert "hidden size 48 to 24; a step of 2 micro-batches of 2 x 16 tokens, bfloat16" in out
    assert "LRC / ordinary" in out and "naive" not in out.partition("FLOPs per token")[0]


def test_shapes_of_the_published_runs_are_described():
    """Every name that --shape takes gives the shape in its table."""
    parser = ArgumentParser()
    add_teacher_flags(parser)
    for name, shape in TEACHER_SHAPES.items():
        base, reader = open_base(parser.parse_args(["--shape", name]))
        assert base.shape == shape == reader.description.shape and base.directory.name == name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--contestants", "lrc,other"], "--contestants other: expected are any of lrc,ordinary,naive."),
        (["--contestants", "ordinary,naive"], "--contestants naive needs the contestant lrc."),
        (["--contestants", "ordinary", "--profile"], "--profile needs the contestant lrc."),
        (["--student-hidden-size", "0"], "--student-hidden-size 0: expected is a number from 1."),
        (["--num-microbatches", "0"], "--num-microbatches 0: expected is a number from 1."),
        (["--fp8-format", "e4m3"], "--fp8-format e4m3 needs --bf16"),
        (["--fp8-format", "e5m2", "--bf16"], "--fp8-format: "),
    ],
)
def test_errors_are_one_line(flags, message, tiny_llama, capsys):
    teacher = tiny_llama()
    capsys.readouterr()  # transformers shows how far writing it has come
    assert benchmark(["step", "--teacher", teacher, *SIZES, *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_every_method_s_step_is_measured_in_turn_and_compared_with_ordinary_training(tiny_llama, tmp_path, capsys):
    file = tmp_path / "figures.json"
    sizes = ["--student-hidden-size", "24", "--seq-length", "16", "--repeats", "3"]
    assert benchmark(["methods", "--teacher", tiny_llama(is_tied=False), *sizes, "--json", str(file)]) == 0
    out, figures = capsys.readouterr().out, json.loads(file.read_text())
    seconds = figures["seconds"]
    assert set(seconds) == set(METHODS) and all(len(own) == 3 for own in seconds.values())
    for name, own in seconds.items():
        ratio = median(ordinary / each for ordinary, each in zip(seconds["ordinary"], own, strict=True))
        assert f" {ratio:,.3f} (" in row_of(out, name) and f" {median(32 / each for each in own):,.0f} (" in row_of(
            out, name
        )
    assert "0.575 (84K tokens/s)" in row_of(out, "lrc") and "0.205 (30K tokens/s)" in row_of(out, "sheared")
    assert methods.rows({"ordinary": [1.0, 2.0], "logits": [2.0, 8.0]}, 10)[2][3] == "0.375 (0.250-0.500)"
