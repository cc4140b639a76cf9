"""`benchmark.py kernels`: what the parts of an LRC step ask of a GPU, counted on this machine without one.

The product's own stage runs on tensors without values (`kernel_counts.py`), with one layer and with two: what the
second one adds is a layer, the rest is the ends. So a model of any size is counted in seconds.

Beside each figure is its bound: every part's inputs and outputs read or written once, and the FLOPs that the method
needs (`estimate/flops.py`).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import Node

from benchmarks import breakdown
from benchmarks.breakdown import CLONE, COMPOSE, EMBEDDING, HEAD, PULL_BACK, STUDENT, TEACHER, around, watch
from benchmarks.kernel_counts import META, Count, KernelCounter, OnMeta, counting
from benchmarks.measure import table
from benchmarks.measured_models import add_teacher_flags, add_width_flags, check_positive, open_base, same_batch
from megatron_lrc.clone.products import add_product
from megatron_lrc.clone.sites import CAPTURED_LINEARS
from megatron_lrc.config import Config, ModelShape, check_precision, raise_all, validate_against_teacher
from megatron_lrc.hf.families import TeacherDescription
from megatron_lrc.hf.rope import rotations
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.gpt_models import layers_of
from megatron_lrc.mcore.optimizer import StageOptimizer, parameter_dtype
from megatron_lrc.mcore.schedules import forward_backward
from megatron_lrc.mcore.stages import Shapes
from megatron_lrc.methods import method_of
from megatron_lrc.methods.lrc.clone_captures import CloneLosses
from megatron_lrc.methods.lrc.paired_model import PairedModel
from megatron_lrc.methods.method import width_and_depth

ZERO, BACKWARD, CLONE_BACKWARD = "zero gradients", "student backward", "clone losses, backward"
EMBEDDINGS = "embeddings, forward and backward"
#: In the table's order. The first three are once a step, the others of each micro-batch.
PARTS = (ZERO, COMPOSE, PULL_BACK, EMBEDDINGS, TEACHER, STUDENT, CLONE, HEAD, BACKWARD, CLONE_BACKWARD)

HEADER = ["of a layer: launches", "GB", "least", "of the step: launches", "GB", "least", "TFLOP", "by arithmetic"]
NOTES = (
    "Counted are megatron-core's local layers, whose elementwise operations are kernels of their own; Transformer "
    "Engine's have fewer launches and bytes. Norms, attention and the package's own compiled functions are one kernel "
    "each. FLOPs are torch's: attention as if each query met all keys, its scores once more in backward. The optimizer "
    "is not in it.",
    "least: what a part reads that others have made, and makes that others read, once. FLOPs by arithmetic: what the "
    "method needs, with causal attention.",
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_teacher_flags(parser)
    add_width_flags(parser)
    for name, default in (("seq-length", 2048), ("micro-batch-size", 1)):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"as in a training (default: {default})"
        )
    parser.add_argument(
        "--untie-embeddings-and-output-weights",
        action="store_true",
        help="as in a training with a closed-form start (default: as the teacher)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write every figure here (default: not)")


def run(arguments: argparse.Namespace, report: Callable[[str], None]) -> int:
    """0. ConfigError for what a training would refuse too."""
    base, _ = open_base(arguments)
    config = _config_of(arguments, base)
    try:
        counts = count_step(config, base)
    finally:
        distributed.stop()
    flops = flops_by_part(config, base.shape)
    for line in _lines(config, base, counts, flops):
        report(line)
    if arguments.json:
        parts = {name: {**asdict(each), "flops_by_arithmetic": flops[name]} for name, each in counts.items()}
        content = {"arguments": vars(arguments), "parts": parts}
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def _config_of(arguments: argparse.Namespace, base: TeacherDescription) -> Config:
    check_positive(arguments, "seq_length", "student_hidden_size", "micro_batch_size")
    config = Config()
    config.model.teacher, config.model.student_hidden_size = str(base.directory), arguments.student_hidden_size
    config.model.untie_embeddings_and_output_weights = arguments.untie_embeddings_and_output_weights or None
    config.compute.transformer_impl = "local"
    training = config.training
    training.seq_length, training.micro_batch_size = arguments.seq_length, arguments.micro_batch_size
    training.bf16, training.train_iters = arguments.bf16, 1
    raise_all(list(check_precision(config)))
    validate_against_teacher(method_of(config), base.shape)
    return config.resolved(1)


# --- counting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PartCount:
    """What a part asks for: of a layer, and of a step of one micro-batch with all layers and both ends."""

    layer: Count
    step: Count


def count_step(config: Config, base: TeacherDescription) -> dict[str, PartCount]:
    """By part, of PARTS. The process group that it starts is the caller's."""
    groups = replace(distributed.start(config), device=META)
    _find_out_what_torch_has()
    one, two = (_count_layers(config, base, groups, layers) for layers in (1, 2))
    layers = {part: two[part] - one[part] for part in PARTS}
    return {part: PartCount(each, one[part] + each * (base.shape.num_layers - 1)) for part, each in layers.items()}


def _find_out_what_torch_has() -> None:
    """What the product tries once (`products._adds_in_the_gemm`) is not to be counted with the first of the models."""
    with counting():
        narrow, wide = (torch.zeros(1, 1, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
        add_product(wide, narrow, narrow, is_first=False)


def _count_layers(
    config: Config, base: TeacherDescription, groups: distributed.Groups, num_layers: int
) -> dict[str, Count]:
    """Part -> what a step asks for there, of a model of so many layers."""
    shape = replace(base.shape, num_layers=num_layers)
    with OnMeta():
        stage, gradients = _build(config, replace(base, shape=shape), groups)
        batches = same_batch(config, shape.vocab_size, META)
    with counting() as counter:
        _watch(stage, counter)
        with counter.part(ZERO):
            gradients.zero_grad_buffer()
            stage.zero_gradients()
        with counter.part(COMPOSE):
            stage.compose()
        with counter.part(BACKWARD):  # and forward, whose parts are inside
            forward_backward([stage], batches, config, num_microbatches=1)
        with counter.part(PULL_BACK):
            stage.pull_back()
    counts = counter.counts()
    counts[EMBEDDINGS] = counts.pop(EMBEDDING)  # its hooks are those of the forward pass
    return {part: counts[part] for part in PARTS}


def _build(config: Config, base: TeacherDescription, groups: distributed.Groups) -> tuple[PairedModel, Any]:
    """A stage, and megatron-core's buffers for the gradients of what it trains."""
    method = method_of(config)
    rope = rotations(base, config.training.seq_length)
    shapes = Shapes(base.shape, method.student_shape(base.shape), rope)
    losses = partial(CloneLosses, terms_of=method.terms_of)
    stage = PairedModel(config, shapes, groups, parameter_dtype(config), layer_losses=losses)
    return stage, StageOptimizer._data_parallel(config, stage)


def _watch(stage: PairedModel, counter: KernelCounter) -> None:
    watch(stage, counter)
    for model, part in ((stage.teacher, TEACHER), (stage.student, STUDENT)):
        around(model.embedding, EMBEDDING, counter)
        for _, layer in layers_of(model):
            around(layer, part, counter)  # apart from each other, so that what they hand on is in the bound
    stage.student.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: _mark_branch([*args, *kwargs.values()][0].grad_fn, EMBEDDING, counter), with_kwargs=True
    )
    for _, layer in layers_of(stage.student):
        for name in CAPTURED_LINEARS:
            linear = layer.get_submodule(name)
            linear.register_forward_hook(lambda _, inputs, output: _mark_clone_loss(output[0].grad_fn, counter))
    stage.register_forward_hook(lambda _, inputs, loss: _mark_head(loss.grad_fn, counter))


def _mark(node: Node, part: str, counter: KernelCounter) -> None:
    """Have what this node of the graph does in backward be in this part."""
    node.register_prehook(lambda *_: counter.enter(part))
    node.register_hook(lambda *_: counter.leave())


def _mark_branch(node: Node, part: str, counter: KernelCounter) -> None:
    """And all that comes behind it."""
    _mark(node, part, counter)
    for behind, _ in node.next_functions:
        if behind is not None:
            _mark_branch(behind, part, counter)


def _mark_clone_loss(node: Node, counter: KernelCounter) -> None:
    """node: of `CloneLoss`, behind which are the student's output and the target."""
    _mark(node, CLONE_BACKWARD, counter)
    (_, (target, _)) = node.next_functions[:2]
    if target is not None:
        _mark_branch(target, CLONE_BACKWARD, counter)


def _mark_head(node: Node, counter: KernelCounter) -> None:
    """node: of both losses, behind which are the student's hidden state and the LM head's gradient."""
    _mark(node, HEAD, counter)
    (_, (head, _)) = node.next_functions[:2]
    assert head is not None, "an LM head is trained"
    _mark(head, HEAD, counter)


# --- saying -------------------------------------------------------------------------------------------------------


def flops_by_part(config: Config, base: ModelShape) -> dict[str, float]:
    """Part -> FLOPs that the method needs there, in a step of one micro-batch."""
    flops = breakdown.flops_by_part(config, base, method_of(config).student_shape(base))
    embedding, backward = flops[EMBEDDING], 2 * flops[STUDENT]
    own = {
        ZERO: 0.0,
        EMBEDDINGS: 2 * embedding,
        BACKWARD: backward,
        CLONE_BACKWARD: flops[breakdown.BACKWARD] - backward - embedding,
    }
    return {part: {**flops, **own}[part] for part in PARTS}


def _lines(
    config: Config, base: TeacherDescription, counts: dict[str, PartCount], flops: dict[str, float]
) -> list[str]:
    training, student = config.training, method_of(config).student_shape(base.shape)
    rows = [_row(part, each, flops[part]) for part, each in counts.items()]
    both = (sum((getattr(each, name) for each in counts.values()), Count()) for name in ("layer", "step"))
    return [
        f"{base.directory.name}, hidden size {base.shape.hidden_size} to {width_and_depth(student)}; a step of one "
        f"micro-batch of {training.micro_batch_size} x {training.seq_length} tokens, "
        f"{str(parameter_dtype(config)).removeprefix('torch.')}; counted, not measured",
        *table([["part", *HEADER], *rows, _row("all of it", PartCount(*both), sum(flops.values()))]),
        "",
        *NOTES,
    ]


def _row(name: str, count: PartCount, flops: float) -> list[str]:
    cells = []
    for each in (count.layer, count.step):
        cells += [f"{each.launches:,.0f}", *(f"{value / 1e9:,.2f}" for value in (each.bytes, each.least_bytes))]
    return [name, *cells, *(f"{value / 1e12:,.2f}" for value in (count.step.flops, flops))]
