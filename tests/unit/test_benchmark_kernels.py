"""tools/benchmark.py kernels: operations count as what they do; no part of a step asks for more than it did."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

from benchmarks.kernel_counts import Count, KernelCounter, counting
from megatron_lrc.clone.fusion import fused_on_cuda
from megatron_lrc.clone.products import has_wide_gemm
from tools_path import load_tool

benchmark = load_tool("benchmark").main

#: LRC-1.5B: part -> launches, and GB read and written, of a step of one micro-batch of 2,048 tokens in bf16, at most.
#: Of megatron-core's own layers, which are another version's business, there is nothing here.
AT_MOST = {
    "zero gradients": (114, 10.2),
    "compose": (338, 14.0),
    "pull back": (816, 41.0),
    "embeddings, forward and backward": (4, 0.14),
    "clone losses, forward": (504, 7.3),
    "LM and KL losses and their gradients": (65, 17.7),
    "clone losses, backward": (448, 17.0),
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """What is said, and the figures in the file. Sizes cost no time, since nothing is computed."""
    file, lines = tmp_path_factory.mktemp("kernels") / "figures.json", []
    sizes = ["--shape", "Llama-3.2-3B-Instruct", "--student-hidden-size", "1536", "--bf16"]
    tool = load_tool("benchmark")
    arguments = tool.parse_arguments(["kernels", *sizes, "--untie-embeddings-and-output-weights", "--json", str(file)])
    assert vars(arguments).pop("module").run(arguments, lines.append) == 0
    return "\n".join(lines), json.loads(file.read_text())["parts"]


@pytest.mark.skipif(not has_wide_gemm(), reason="this torch has no products of half precision with fp32 results")
@pytest.mark.parametrize("part", AT_MOST)
def test_no_part_asks_for_more_than_it_did(counted, part):
    """A temporary of the vocabulary's or of a compared pair's size, or an operation in each layer, is more."""
    step, (launches, gigabytes) = counted[1][part]["step"], AT_MOST[part]
    assert 0.9 * launches < step["launches"] <= launches  # far less: narrow the bound
    assert 0.9 * gigabytes < step["bytes"] / 1e9 <= gigabytes
    assert 0 < step["least_bytes"] <= step["bytes"]


def test_what_the_method_needs_is_what_is_counted_but_for_attention(counted):
    for part, each in counted[1].items():
        flops, needed = each["step"]["flops"], each["flops_by_arithmetic"]
        assert flops == needed or part in ("teacher forward", "student forward", "student backward")
        assert needed <= flops <= 1.2 * needed
    assert sum(each["step"]["flops"] for each in counted[1].values()) > 5e13


def test_the_table_says_what_the_file_does(counted):
    out, parts = counted
    assert "hidden size 3072 to 1536 (untied), 28 layers; a step of one micro-batch of 1 x 2048 tokens, bfloat16" in out
    assert "megatron-core's local layers" in out and "Transformer Engine's have fewer launches" in out
    for part, each in parts.items():
        (row,) = re.findall(rf"^{part}.*$", out, re.M)
        layer, step = each["layer"], each["step"]
        assert f" {layer['launches']:,.0f} " in row and f" {step['launches']:,.0f} " in row
        assert f" {step['bytes'] / 1e9:,.2f} " in row and f" {each['flops_by_arithmetic'] / 1e12:,.2f}" in row


def test_tied_in_fp32_from_a_config_alone_and_longer_micro_batches(tiny_llama, capsys):
    config = tiny_llama(is_tied=True) + "/config.json"
    sizes = ["--student-hidden-size", "24", "--seq-length", "16", "--micro-batch-size", "2"]
    assert benchmark(["kernels", "--teacher-config", config, *sizes]) == 0
    assert "48 to 24 (tied), 2 layers; a step of one micro-batch of 2 x 16 tokens, float32" in capsys.readouterr().out


def test_sizes_that_cannot_be_are_a_sentence(capsys):
    flags = ["--shape", "Llama-2-7b-chat", "--student-hidden-size", "1640", "--micro-batch-size", "0"]
    assert benchmark(["kernels", *flags]) == 2
    assert "--micro-batch-size 0: expected is a number from 1." in capsys.readouterr().err


def counts_of(function) -> dict[str, Count]:
    with counting() as counter:
        function(counter)
    return counter.counts()


def test_operations_read_and_write_what_they_touch():
    def run(counter: KernelCounter) -> None:
        x = torch.zeros(10, 10)  # written: 400 bytes
        with counter.part("elementwise"):
            (x + x.t()).view(-1)  # two regions read, one written
        with counter.part("in place"):
            x.add_(1).copy_(x.new_empty(10, 1).expand(10, 10))  # read and written; a column read, all written
        with counter.part("product"):
            torch.mm(x, x, out=x)  # not read for being the result
            x.addmm_(x, x.t())
        with counter.part("by index"):
            F.embedding(torch.zeros(3, dtype=torch.int64), x)
            x.index_add_(0, torch.zeros(2, dtype=torch.int64), x[:2])
        with counter.part("norm"):
            F.rms_norm(x, (10,))
        with counter.part("outer"), counter.part("inner"):
            x.sum()

    counts = counts_of(run)
    found = {name: (each.launches, each.bytes, each.flops) for name, each in counts.items()}
    assert found == {
        "other": (1, 400, 0),
        "elementwise": (1, 1200, 0),
        "in place": (2, 800 + 440, 0),
        "product": (2, 800 + 1200, 4000),
        "by index": (4, (24 + 120 + 144) + (16 + 80 + 160 + 16), 0),  # what is gathered, and what is added to
        "norm": (1, 840, 0),  # a number of each row is kept
        "outer": (0, 0, 0),
        "inner": (1, 404, 0),
    }


def test_a_compiled_function_is_one_kernel_and_one_for_each_product_in_it():
    @fused_on_cuda
    def chain(x, y):
        return x.mul_(2).sub(y).square().sum(1)

    @fused_on_cuda
    def with_product(x, weight):
        return (weight @ (x * x)) * 2

    def run(counter: KernelCounter) -> None:
        x, y, weight = torch.empty(10, 10), torch.empty(10, 10), torch.empty(2, 10)
        with counter.part("chain"):
            chain(x, y)
        with counter.part("product"):
            with_product(x, weight)

    counts = counts_of(run)
    assert (counts["chain"].launches, counts["chain"].bytes) == (1, 800 + 400 + 40)
    product = counts["product"]
    materialised = 400 + 400  # the squares: written by the one, read by the other
    assert (product.launches, product.flops) == (2, 400)
    assert product.bytes == (400 + 80 + 80 + 80) + (80 + 80) + materialised


def test_the_bound_is_what_parts_hand_on():
    """Once, however often it is read; what a part makes for itself is not in it, nor for nobody."""

    def run(counter: KernelCounter) -> None:
        weight = torch.empty(10, 10)
        with counter.part("first"):
            handed_on = (weight * 2) @ weight
            weight.sum()
        with counter.part("second"):
            weight.add_(handed_on).add_(handed_on)

    counts = counts_of(run)
    assert [counts[part].least_bytes for part in ("first", "second")] == [400 + 400, 400 + 400 + 400]
