"""What is compiled on a GPU gives, compiled here for the CPU, what it gives as it stands; for every size in one go."""

import functools
import math
import re
import shutil
import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves

from megatron_lrc.clone import divergences, fusion, losses, vocab_parallel
from megatron_lrc.clone.fusion import compile_nothing, compile_problem, fused_on_cuda
from megatron_lrc.clone.sites import LAYER_SITES, HeadLayout

HALF = torch.bfloat16


def logits(tokens, vocab):
    return torch.randn(tokens, vocab) * 5


def arguments(name, n, v):
    student, teacher = logits(n, v), logits(n, v)
    tops = student.amax(1), teacher.amax(1)
    pair = torch.randn(n, 2, v).to(HALF), torch.randn(n, 2, v).to(HALF)
    linear = "self_attention.linear_qkv" if v % 4 == 0 else "mlp.linear_fc2"  # three sites, or one
    sites = tuple(site for site in LAYER_SITES if site.linear == linear)
    places = sites, HeadLayout(head_dim=v // 4, queries_per_group=2), 1
    return {
        "_student_sum": (student, tops[0]),
        "_student_gradient": (student, tops[0], torch.rand(n)),
        "sums_of_both": (student, teacher, *tops, 40.0),
        "_gap_sum": (student, teacher, *tops),
        "_forward_gradient": (student, teacher, *tops, torch.rand(3, n), 40.0),
        "_divergence_sums": (student, teacher, *tops, torch.rand(2, n) + 1, 2.0, 0.3),
        "_divergence_gradient": (student, teacher, *tops, torch.rand(2, n) + 1, 2.0, 0.3, torch.rand(3, n)),
        "_sums_of_shares": (student, teacher, *tops, torch.rand(2, n) + 1, 2.0),
        "_scaled_shares": (student, tops[0], torch.rand(2, n), 2.0),
        "squared_errors": (*pair, *places),
        "mean_squares": (pair[0], *places),
        "_add_error": (torch.randn(n, 2, v).to(HALF), *pair, torch.rand(n, 2, len(sites)), *places),
        "_error": (*pair, torch.rand(n, 2, len(sites)), *places),
    }[name]


class OnGpu(torch.Tensor):
    is_cuda = True


def test_what_cannot_be_compiled_says_so_once_and_runs_as_it_is():
    @fused_on_cuda
    def doubled(x):
        torch._dynamo.graph_break()  # which no whole graph can hold
        return 2 * x

    x = torch.ones(3).as_subclass(OnGpu)
    with pytest.warns(UserWarning, match=r"^doubled is not compiled and runs slower: .*needs Triton and a C compiler"):
        assert torch.equal(doubled(x), 2 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(doubled(x), 2 * x)


def test_more_kinds_of_arguments_than_torch_compiles_for_end_no_run():
    """torch's exception for that is none of TorchDynamoException's."""

    @fused_on_cuda
    def doubled(x):
        return 2 * x

    x = torch.ones(3).as_subclass(OnGpu)
    with (
        torch._dynamo.config.patch(recompile_limit=0),
        pytest.warns(UserWarning, match=r"^doubled is not compiled .* more kinds than torch._dynamo.config.recompile"),
    ):
        assert torch.equal(doubled(x), 2 * x)


def test_where_nothing_is_compiled_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(fusion, "_compiled", lambda _: pytest.fail("something was compiled"))
    doubled = fused_on_cuda(lambda x: 2 * x)
    compile_nothing("on rank 0: no compiler")
    try:
        assert doubled(torch.ones(3).as_subclass(OnGpu)).sum() == 6
    finally:
        compile_nothing(None)


def without_c_compiler(function, **_):
    def call(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    return call


@pytest.mark.parametrize("compiler, expected", [
    (functools.partial(torch.compile, backend="eager"), None),
    (without_c_compiler, "Failed to find C compiler. Please specify via CC environment variable."),
])  # fmt: skip
def test_the_probe_compiles_and_says_in_a_line_what_is_missing(monkeypatch, compiler, expected):
    monkeypatch.setattr(torch, "compile", compiler)
    assert compile_problem.__wrapped__(torch.device("cpu")) == expected


def test_a_compilers_message_is_told_without_its_backends_name():
    inner = "backend='inductor' raised:\nRuntimeError: Failed to find C compiler.\n\nSet TORCHDYNAMO_VERBOSE=1"
    assert fusion.first_line(RuntimeError(inner)) == "RuntimeError: Failed to find C compiler."
    assert fusion.first_line(AssertionError()) == "AssertionError"


def elements(values):
    """Of all tensors in it."""
    return sum(x.numel() for x in tree_leaves(values) if isinstance(x, torch.Tensor))


def elements_allocated(code):
    """Of all buffers that compiled code makes, for the sizes that it was compiled for."""
    given = dict(re.findall(r"(arg\d+_1) = (\d+)$", code, re.M))
    symbols = {name: int(given[argument]) for name, argument in re.findall(r"(s\d+) = (arg\d+_1)$", code, re.M)}
    buffers = [eval(f"({each})", symbols) for each in re.findall(r"= empty_strided_cpu\((.*), torch\.\w+\)", code)]
    return sum(math.prod(shape) for shape, _ in buffers)


@pytest.mark.slow  # compiling takes 20 s
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("module, names", [
    (vocab_parallel, ("_student_sum", "_student_gradient", "_gap_sum")),
    (divergences, ("sums_of_both", "_forward_gradient", "_divergence_sums", "_divergence_gradient")),
    (divergences, ("_sums_of_shares", "_scaled_shares")),
    (losses, ("squared_errors", "mean_squares", "_add_error", "_error")),
])  # fmt: skip
def test_compiled_functions_equal_themselves_and_keep_nothing_between(module, names):
    """Beside their results they make buffers for a few numbers of each token, and none of their arguments' size."""
    from torch._inductor import utils  # loads the compiler

    for name in names:
        plain = getattr(module, name).__wrapped__
        compiled = torch.compile(plain, dynamic=True, fullgraph=True)
        for tokens, vocab in ((64, 500), (33, 301)):
            given = arguments(name, tokens, vocab)
            copies = [[x.clone() if isinstance(x, torch.Tensor) else x for x in given] for _ in range(2)]
            result = plain(*copies[0])
            again, codes = utils.run_and_get_code(compiled, *copies[1])
            allocated = sum(map(elements_allocated, codes))
            assert elements(result) <= allocated <= elements(result) + 20 * tokens or not codes, name
            if result is None:  # in place
                result, again = copies[0][0], copies[1][0]
            tolerance = 2e-2 if given[0].dtype == HALF else 1e-5
            torch.testing.assert_close(again, result, rtol=tolerance, atol=tolerance, msg=name)
