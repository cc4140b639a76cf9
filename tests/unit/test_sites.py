"""The table of cloned weights, at random sizes: fused matrices come apart whole, and pull_back transposes compose."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lrc.clone.sites import EMBED, LAYER_SITES, LM_HEAD, HeadLayout, Site, compose, pull_back, select

SITES = (*LAYER_SITES, EMBED, LM_HEAD)
BY_NAME = {site.name: site for site in SITES}
LINEARS = {linear: list(sites) for linear, sites in itertools.groupby(SITES, key=lambda site: site.linear)}

head_layouts = st.builds(HeadLayout, head_dim=st.integers(1, 6), queries_per_group=st.integers(1, 4))
counts, widths = st.integers(1, 4), st.integers(1, 7)
repeatable = settings(derandomize=True, deadline=None)


def num_rows(linear: str, heads: HeadLayout, count: int) -> int:
    """Rows that a linear may have: `count` KV groups, gate and up of `count` features each, or any number."""
    per_group = (heads.queries_per_group + 2) * heads.head_dim
    return count * {"linear_qkv": per_group, "linear_fc1": 2}.get(linear.rpartition(".")[2], 1)


def whole_numbers(*shape: int) -> Tensor:
    """Small enough that sums of products are exact: equality means equality."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(1)).double()


@repeatable
@given(linear=st.sampled_from(sorted(LINEARS)), heads=head_layouts, count=counts)
@pytest.mark.parametrize("dim", [0, -1], ids=["weight", "activation"])
def test_the_sites_of_a_fused_matrix_have_each_of_its_rows_exactly_once(dim, linear, heads, count):
    rows = torch.arange(num_rows(linear, heads, count))
    fused = rows[:, None].expand(-1, 3) if dim == 0 else rows.expand(3, -1)
    parts = [select(site, fused, heads, dim) for site in LINEARS[linear]]
    found = [part.flatten(0, -2)[:, 0] if dim == 0 else part[0].flatten() for part in parts]
    assert torch.cat(found).sort().values.equal(rows)


@repeatable
@given(heads=head_layouts, groups=counts)
def test_the_queries_keys_and_values_of_a_fused_matrix_are_in_hugging_faces_order(heads, groups):
    sizes = {"q": groups * heads.queries_per_group * heads.head_dim, "k": groups * heads.head_dim}
    sizes["v"] = sizes["k"]
    separate = {name: whole_numbers(size, 2) + 100 * ord(name) for name, size in sizes.items()}
    per_group = zip(*(separate[name].chunk(groups) for name in "qkv"), strict=True)
    fused = torch.cat([part for group in per_group for part in group])
    for name, matrix in separate.items():
        assert select(BY_NAME[name], fused, heads).flatten(0, 1).equal(matrix)


@repeatable
@given(site=st.sampled_from(SITES), heads=head_layouts, count=counts, teacher=widths, student=widths, inputs=widths)
def test_pull_back_is_the_exact_transpose_of_compose(site: Site, heads, count, teacher, student, inputs):
    """<compose(P), G> = <P, pull_back(G)>, which with linearity defines it."""
    if site.projected == "input":
        old = select(site, whole_numbers(num_rows(site.linear, heads, count), teacher), heads)
    else:
        old = whole_numbers(teacher, inputs)
    projection = whole_numbers(teacher, student)
    composed = compose(site, old, projection)
    grad = whole_numbers(*composed.shape).flip(0) - 3
    pulled = pull_back(site, old, grad)
    assert pulled.shape == projection.shape
    assert (composed * grad).sum() == (projection * pulled).sum()


@repeatable
@given(site=st.sampled_from(SITES), per_rank=widths, ranks=counts, teacher=widths, student=widths)
def test_shards_compose_to_shards_and_pull_back_to_partial_sums(site: Site, per_rank, ranks, teacher, student):
    shape = (per_rank * ranks, teacher) if site.split == 0 else (teacher, per_rank * ranks)
    old, projection = whole_numbers(*shape), whole_numbers(teacher, student)
    composed = compose(site, old, projection)
    grad = composed.flip(0) % 7
    shards, grads = old.chunk(ranks, site.split), grad.chunk(ranks, site.split)
    assert torch.cat([compose(site, shard, projection) for shard in shards], site.split).equal(composed)
    partial = [pull_back(site, *pair) for pair in zip(shards, grads, strict=True)]
    assert torch.stack(partial).sum(0).equal(pull_back(site, old, grad))
