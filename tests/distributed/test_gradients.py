"""Losses and every gradient on every layout against the single-process fp64 autograd reference."""

from dataclasses import replace

import pytest
import torch

from gradient_cases import VOCAB, Layout, Sizes, Variant, compare_with_the_reference
from hf_teachers import OTHERWISE, ROTATED, write_qwen2, write_qwen3

LAYOUTS = [
    Layout(micro=24),
    Layout(micro=8),
    Layout(micro=3),
    Layout(tp=2),
    Layout(pp=2),
    Layout(pp=2, micro=8, first=1),
    Layout(pp=2, chunks=2),
    Layout(pp=2, micro=3, chunks=2),
    Layout(pp=2, ends=True),
    Layout(dp=2),
    Layout(cp=2),
    Layout(cp=2, recompute="core_attn"),
    Layout(dp=2, share=True, overlap=True),
    Layout(cp=2, share=True),
    Layout(pp=2, drawn="Etttt|L"),
    Layout(pp=2, chunks=2, drawn="E|tt|(t)*2|L"),
    pytest.param(Layout(tp=2, pp=2), marks=pytest.mark.slow),
    pytest.param(Layout(tp=2, cp=2), marks=pytest.mark.slow),
    pytest.param(Layout(pp=2, cp=2, chunks=2), marks=pytest.mark.slow),
    pytest.param(Layout(cp=4), marks=pytest.mark.slow),
    pytest.param(Layout(cp=2, dp=2), marks=pytest.mark.slow),
    pytest.param(Layout(pp=2, dp=2), marks=pytest.mark.slow),
    pytest.param(Layout(pp=4), marks=pytest.mark.slow),
    pytest.param(Layout(tp=2, dp=2), marks=pytest.mark.slow),
    pytest.param(Layout(tp=2, pp=2, chunks=2), marks=pytest.mark.slow),
    pytest.param(Layout(tp=2, dp=2, share=True), marks=pytest.mark.slow),
    pytest.param(Layout(tp=2, dp=2, share=True, overlap=True), marks=pytest.mark.slow),
    pytest.param(Layout(cp=2, dp=2, share=True, overlap=True, recompute="mlp"), marks=pytest.mark.slow),
    pytest.param(Layout(pp=2, dp=2, share=True), marks=pytest.mark.slow),
    pytest.param(Layout(pp=2, chunks=2, dp=2, share=True, overlap=True), marks=pytest.mark.slow),
]


VARIANTS = [
    Variant(released=True, student_epsilon=0.3),
    Variant(detach=True),
    Variant(normalization="token", terms="q v o gate up down", off=tuple((i, "k") for i in range(4))),
    Variant(lm_weight=0.4, kl_weight=0.0),
    Variant(divergence="jsd:0.3", kl_weight=50.0),
    Variant(divergence="reverse", top_k=5, kl_weight=50.0),
    Variant(lm_weight=0.0, alpha=1.5),
    Variant(
        terms="q v:0,2-3 o:1 gate up down:0-1",
        off=(*((i, "k") for i in range(4)), (1, "v"), (0, "o"), (2, "o"), (3, "o"), (2, "down"), (3, "down")),
    ),
]


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_losses_and_gradients_equal_the_reference(tiny_llama, layout, tied):
    assert_equal_to_the_reference(tiny_llama, layout, Variant(), tied=tied)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [Layout(micro=12), Layout(tp=2), Layout(pp=2, recompute="full")], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=range(len(VARIANTS)))
def test_every_variant_of_the_loss_equals_the_reference(tiny_llama, layout, variant):
    assert_equal_to_the_reference(tiny_llama, layout, variant, tied=False)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(dp=2), Layout(tp=2, pp=2)], ids=str)
def test_a_divergence_over_the_top_k_equals_the_reference(tiny_llama, layout):
    assert_equal_to_the_reference(tiny_llama, layout, Variant(divergence="jsd:0.3", top_k=8, kl_weight=50.0), tied=True)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(dp=2)], ids=str)
def test_typical_energies_are_those_of_all_tokens(tiny_llama, layout):
    assert_equal_to_the_reference(tiny_llama, layout, Variant(normalization="token"), tied=True)


@pytest.mark.distributed
@pytest.mark.slow
def test_four_tensor_parallel_ranks_equal_the_reference(tiny_llama):
    teacher = tiny_llama(num_kv_heads=4, num_layers=4, vocab_size=VOCAB, dtype=torch.float64)
    assert_equal_to_the_reference(lambda **settings: teacher, Layout(tp=4), Variant(), tied=False)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("write", "variant"),
    [(write_qwen2, Variant()), (write_qwen3, Variant(student_epsilon=0.02))],
    ids=["qwen2", "qwen3"],
)
@pytest.mark.parametrize("layout", [Layout(micro=12), Layout(tp=2), Layout(pp=2, chunks=2, recompute="full")], ids=str)
def test_other_families_equal_the_reference(tmp_path, layout, write, variant):
    write(tmp_path, num_layers=4, dtype=torch.float64)
    assert_equal_to_the_reference(lambda **settings: str(tmp_path), layout, variant, tied=False)


@pytest.mark.distributed
@pytest.mark.parametrize("write", [*OTHERWISE, *ROTATED], ids=lambda write: write.__name__.removeprefix("write_"))
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, pp=2),
        pytest.param(Layout(micro=12), marks=pytest.mark.slow),
        pytest.param(Layout(tp=2), marks=pytest.mark.slow),
        pytest.param(Layout(pp=2, recompute="core_attn"), marks=pytest.mark.slow),
        pytest.param(Layout(pp=2, chunks=2, recompute="full"), marks=pytest.mark.slow),
        pytest.param(Layout(cp=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_families_that_compute_otherwise_equal_the_reference(tmp_path, layout, write):
    """Of a student with fewer layers each has what the teacher's layer has that it is made of. On one rank it keeps one
    group and some of the neurons, too; under context parallelism documents are packed."""
    write(tmp_path, num_layers=4, dtype=torch.float64, is_tied=layout.tp == 2)
    is_packed, kept = layout.cp > 1, (0, 2, 3) if layout.chunks == 1 and layout.tp * layout.pp < 4 else None
    part = (1, 24) if layout.world == 1 else (None, None)
    variant = Variant(kept=kept, groups=part[0], neurons=part[1], reset_attention=is_packed, reset_positions=is_packed)
    sizes = Sizes(vocab=10, eod=3) if is_packed else Sizes()
    compare_with_the_reference(str(tmp_path), layout, variant, tied=layout.tp == 2, sizes=sizes)


FEWER_LAYERS = Variant(kept=(0, 2, 3))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        Layout(micro=12),
        Layout(tp=2),
        Layout(pp=2, recompute="full"),
        Layout(pp=2, drawn="Ettt|tL"),
        pytest.param(Layout(pp=2, first=1), marks=pytest.mark.slow),
        pytest.param(Layout(cp=2), marks=pytest.mark.slow),
        pytest.param(Layout(dp=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_student_with_fewer_layers_equals_the_reference(tiny_llama, layout):
    assert_equal_to_the_reference(
        tiny_llama, layout, FEWER_LAYERS, tied=2 in (layout.tp, layout.cp) or layout.drawn is not None
    )


@pytest.mark.distributed
@pytest.mark.parametrize("write", [write_qwen2, write_qwen3], ids=["qwen2", "qwen3"])
def test_fewer_layers_of_other_families_equal_the_reference(tmp_path, write):
    write(tmp_path, num_layers=4, dtype=torch.float64)
    variant = replace(FEWER_LAYERS, released=write is write_qwen2, normalization="token")
    assert_equal_to_the_reference(lambda **settings: str(tmp_path), Layout(micro=12), variant, tied=False)


@pytest.mark.distributed
def test_a_layer_of_the_student_on_each_interleaved_stage_equals_the_reference(tmp_path):
    write_qwen3(tmp_path, num_layers=6, dtype=torch.float64)
    layout, variant = Layout(pp=2, chunks=2, drawn="Ett|t|tt|tL"), Variant(kept=(1, 2, 4, 5))
    compare_with_the_reference(str(tmp_path), layout, variant, tied=False)


MANY_HEADS = {"num_heads": 8, "num_kv_heads": 4, "num_layers": 4, "vocab_size": VOCAB, "dtype": torch.float64}
SLIMMER = Variant(groups=2, neurons=24)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "variant", "tied"),
    [
        (Layout(micro=12), replace(SLIMMER, released=True), False),
        (Layout(tp=2), replace(SLIMMER, normalization="token"), True),
        (Layout(pp=2, recompute="full"), replace(SLIMMER, kept=(0, 2, 3)), False),
        pytest.param(Layout(cp=2), replace(SLIMMER, neurons=None), False, marks=pytest.mark.slow),
        pytest.param(Layout(dp=2), replace(SLIMMER, groups=None), False, marks=pytest.mark.slow),
        pytest.param(Layout(tp=2, dp=2, share=True), SLIMMER, False, marks=pytest.mark.slow),
        pytest.param(Layout(tp=2, pp=2), replace(SLIMMER, released=True), False, marks=pytest.mark.slow),
        pytest.param(Layout(pp=2, chunks=2), replace(SLIMMER, reset_attention=True), True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_slimmer_student_equals_the_reference(tiny_llama, layout, variant, tied):
    teacher = tiny_llama(is_tied=tied, **MANY_HEADS)
    compare_with_the_reference(teacher, layout, variant, tied=tied)


@pytest.mark.distributed
@pytest.mark.parametrize("write", [write_qwen2, pytest.param(write_qwen3, marks=pytest.mark.slow)])
def test_slimmer_students_of_other_families_equal_the_reference(tmp_path, write):
    write(tmp_path, num_layers=2, dtype=torch.float64, num_heads=8, num_kv_heads=4)
    compare_with_the_reference(str(tmp_path), Layout(tp=2), SLIMMER, tied=False)


@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["full", "core_attn", "mlp"])
@pytest.mark.parametrize("layout", [Layout(pp=2, chunks=2), Layout(tp=2)], ids=str)
def test_recomputation_changes_nothing(tiny_llama, layout, recompute):
    assert_equal_to_the_reference(tiny_llama, replace(layout, recompute=recompute), Variant(), tied=True)


def assert_equal_to_the_reference(tiny_llama, layout: Layout, variant: Variant, *, tied: bool) -> None:
    teacher = tiny_llama(is_tied=tied, num_layers=4, vocab_size=VOCAB, dtype=torch.float64)
    names = compare_with_the_reference(teacher, layout, variant, tied=tied)
    assert len(names) == len(variant.kept or range(4)) * 7 + (1 if tied else 2)
