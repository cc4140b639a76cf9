"""Writes docs/layouts.md: for each layout the largest relative error of any gradient against the fp64 reference.

    make layout-report

The error of a gradient is the largest difference of its elements over the largest element of the reference's. Beyond
the layouts of the test suite this has four-rank ones that are slow on small machines.
"""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from gradient_cases import VOCAB, Layout, Variant, clone_gradients, gradient_config, reference_gradients
from hf_teachers import write_llama, write_qwen2, write_qwen3
from ranks import run_ranks

LAYOUTS = {
    "1 rank, 4 micro-batches": Layout(),
    "TP2 + SP": Layout(tp=2),
    "TP4 + SP": Layout(tp=4),
    "1 rank, 1 micro-batch": Layout(micro=24),
    "1 rank, 3 micro-batches": Layout(micro=8),
    "1 rank, 8 micro-batches": Layout(micro=3),
    "PP2": Layout(pp=2),
    "PP2, 3 micro-batches": Layout(pp=2, micro=8),
    "PP2, 8 micro-batches": Layout(pp=2, micro=3),
    "PP2, first stage smaller": Layout(pp=2, first=1),
    "PP2, ends counted as layers": Layout(pp=2, ends=True),
    "PP4": Layout(pp=4),
    "PP2 interleaved x 2": Layout(pp=2, chunks=2),
    "PP2 interleaved x 2, full recomputation": Layout(pp=2, chunks=2, recompute="full"),
    "DP2": Layout(dp=2),
    "CP2": Layout(cp=2),
    "CP4": Layout(cp=4),
    "CP2, attention recomputed": Layout(cp=2, recompute="core_attn"),
    "PP2, stages by hand": Layout(pp=2, drawn="Ettt|tL"),
    "TP2 + SP x CP2": Layout(tp=2, cp=2),
    "PP2 interleaved x 2 x CP2": Layout(pp=2, cp=2, chunks=2),
    "CP2 x DP2": Layout(cp=2, dp=2),
    "TP2 + SP x PP2": Layout(tp=2, pp=2),
    "TP2 + SP x PP2 interleaved x 2": Layout(tp=2, pp=2, chunks=2),
    "TP2 + SP x DP2": Layout(tp=2, dp=2),
    "PP2 x DP2": Layout(pp=2, dp=2),
    "DP2, --share-compose": Layout(dp=2, share=True),
    "DP2, --share-compose, --overlap-grad-reduce": Layout(dp=2, share=True, overlap=True),
    "CP2, --share-compose": Layout(cp=2, share=True),
    "TP2 + SP x DP2, --share-compose": Layout(tp=2, dp=2, share=True),
    "PP2 x DP2, --share-compose": Layout(pp=2, dp=2, share=True),
}
RELATIVE = Variant(normalization="token")
FEWER_LAYERS = Variant(kept=(0, 2, 3))
SLIMMER = Variant(groups=2, neurons=24)  # of 4 and 80
TOP_K = Variant(divergence="jsd:0.3", top_k=8, kl_weight=50.0)
PARTS = ("1 rank, 4 micro-batches", "TP2 + SP", "PP2", "CP2", "DP2")
VARIANTS = {
    **{f"{title}, --clone-normalization token": (LAYOUTS[title], RELATIVE) for title in PARTS},
    **{f"{title}, layers 0, 2 and 3 of 4": (LAYOUTS[title], FEWER_LAYERS) for title in (*PARTS, "PP2, stages by hand")},
    **{f"{title}, half the KV groups, 3 of 10 neurons": (LAYOUTS[title], SLIMMER) for title in PARTS},
    "TP2 + SP x PP2, the same and layers 0, 2 and 3": (
        LAYOUTS["TP2 + SP x PP2"],
        replace(SLIMMER, kept=FEWER_LAYERS.kept, normalization="token"),
    ),
    **{
        f"{title}, --kl-divergence jsd:0.3 --kl-top-k 8": (LAYOUTS[title], TOP_K)
        for title in (*PARTS, "TP2 + SP x PP2", "TP4 + SP")
    },
}
TEACHERS = {"Llama": write_llama, "Qwen2": write_qwen2, "Qwen3": write_qwen3}


def largest_error(teacher: str, layout: Layout, variant: Variant) -> float:
    ranks = run_ranks(layout.world, clone_gradients, gradient_config(teacher, layout, untie=True, variant=variant))
    names = tuple(sorted({name for _, matrices, _ in ranks for name in matrices}))
    _, projections, norms = reference_gradients(teacher, names, variant)
    errors = []
    for _, matrices, gains in ranks:
        for name, (tp_rank, grad, _) in matrices.items():
            errors.append(relative_error(grad, projections[name].grad.chunk(layout.tp)[tp_rank]))
        errors += [relative_error(grad, norms[name].grad) for name, (grad, _) in gains.items()]
    return max(errors)


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    return ((found - reference).abs().max() / reference.abs().max()).item()


def main() -> None:
    os.environ["PYTHONWARNINGS"] = "ignore"  # every rank has megatron-core's to say
    transformers.utils.logging.disable_progress_bar()
    output = Path(__file__).parents[1] / "docs/layouts.md"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        teachers = {}
        for name, write in TEACHERS.items():
            settings = {"vocab_size": VOCAB} if write is write_llama else {}
            for num_heads in (4, 8):  # in groups of two
                directory = Path(folder) / f"{name}-{num_heads}"
                heads = {"num_heads": num_heads, "num_kv_heads": num_heads // 2}
                write(directory, num_layers=4, dtype=torch.float64, **heads, **settings)
                teachers[name, num_heads] = str(directory)
        plain = {title: (layout, Variant()) for title, layout in LAYOUTS.items()}
        for title, (layout, variant) in (plain | VARIANTS).items():
            num_heads = 8 if layout.tp == 4 or variant.groups else 4  # each rank needs a KV group
            errors = (largest_error(teachers[name, num_heads], layout, variant) for name in TEACHERS)
            cells = [f"{error:.1e}" for error in errors]
            rows.append(f"| {title} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    output.parent.mkdir(exist_ok=True)
    output.write_text(
        "# Gradients on every layout\n\n"
        "Largest relative error of any projection's or norm gain's gradient against a single-process autograd\n"
        "reference (`tests/reference.py`), both in fp64, with ragged loss masks and all losses on. Students are\n"
        "untied: their embeddings are the teacher's, projected. (`distributed/test_gradients.py` has tied ones too.)\n"
        "Made by `make layout-report`.\n\n"
        f"| layout | {' | '.join(TEACHERS)} |\n|---|{'---|' * len(TEACHERS)}\n" + "\n".join(rows) + "\n"
    )
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
