"""The FLOPs that estimate/flops.py derives from shapes are those that torch counts in a real step.

One difference is put back to compare: torch counts attention as if each query met all keys. Its attention kernel for
CPUs is not among those it counts, so attention runs as plain matrix products here.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.breakdown import flops_by_part
from megatron_lrc.config import Config, ModelShape
from megatron_lrc.estimate.flops import StepFlops, step_flops
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.schedules import forward_backward
from megatron_lrc.methods import method_of
from megatron_lrc.methods.lrc.paired_model import PairedModel
from megatron_lrc.train import loop
from megatron_lrc.train.start_checks import check
from ranks import run_ranks
from runs import make_config, on_layout


@dataclass(frozen=True)
class Counted:
    """What torch counted on one rank."""

    teacher: int  # forward, without its LM head
    forward: int  # both models, as in a validation: the teacher's head included
    step: int
    compose: int
    pull_back: int


def count_step(config: Config) -> Counted:
    """On a rank: one step, part by part."""
    trainer = loop.Trainer(config, check(config, distributed.world_size()), distributed.start(config))
    if method_of(config).change_step is not None:
        trainer._change()
    run = trainer.run

    def pass_through(**how) -> int:
        batches = trainer._batches(trainer.train_data, 0)
        with counter() as passed, sdpa_kernel(SDPBackend.MATH):
            forward_backward(run.stages, batches, config, num_microbatches=run.num_microbatches, **how)
        return passed.get_total_flops()

    with counter() as compose:
        run.compose()
    step = pass_through()
    with counter() as pull_back:
        run.pull_back()
    for stage in run.stages:
        stage.requires_grad_(False)
    with torch.no_grad():
        teacher = pass_through(forward_only=True, forward_step=PairedModel.forward_teacher)
        forward = pass_through(forward_only=True)
    return Counted(teacher, forward, step, compose.get_total_flops(), pull_back.get_total_flops())


def counter() -> FlopCounterMode:
    """torch's, which leaves out the one product that adds to its result in place: the gradient of the LM head."""

    def product(_, left: torch.Size, right: torch.Size, **__) -> int:
        return 2 * left[0] * left[1] * right[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})


def causal_saving(config: Config, shape: ModelShape) -> float:
    """Of one model's forward pass, what torch counts beyond the keys that a query meets."""
    training = config.training
    assert training.global_batch_size is not None
    keys_not_met = training.seq_length - (training.seq_length + 1) / 2
    tokens = training.global_batch_size * training.seq_length
    return 4 * tokens * shape.num_attention_heads * shape.head_dim * keys_not_met * shape.num_layers


def set_up(teacher: str, data: str, folder, change) -> Config:
    config = make_config(teacher, data, folder, steps=1)
    config.checkpoint.save = None
    change(config)
    return config


def no_kl(config: Config) -> None:
    config.loss.kl_weight = 0.0


def released(config: Config) -> None:
    config.loss.clone_attention_output = "teacher"


def some_terms(config: Config) -> None:
    config.loss.clone_terms, config.loss.detach_clone_targets = ["o:1", "down:0", "gate"], True


def fewer_layers(config: Config) -> None:
    config.model.student_layers = ["1"]


def logits(config: Config) -> None:
    config.model.method = "logits"


def opened(config: Config) -> None:
    config.projection.open_after = 1


def opened_all(config: Config) -> None:
    config.projection.open_after, config.projection.open_matrices = 1, "all"


def shared(config: Config) -> None:
    config.parallel.share_compose = True


def nothing_special(_: Config) -> None:
    pass


ONE_PROCESS = [
    pytest.param({}, is_tied, change, id=f"{change.__name__}-{'tied' if is_tied else 'untied'}")
    for change in (nothing_special, no_kl, released, some_terms)
    for is_tied in (True, False)
]


@pytest.mark.parametrize(
    "layout, is_tied, change",
    [
        *ONE_PROCESS,
        *[pytest.param({}, False, change, id=change.__name__) for change in (logits, opened, opened_all, fewer_layers)],
        pytest.param({"tp": 2}, False, nothing_special, id="TP2"),
        pytest.param({"pp": 2}, True, nothing_special, id="PP2-tied"),
        pytest.param({"pp": 2}, False, nothing_special, id="PP2-untied"),
        pytest.param({"dp": 2}, True, nothing_special, id="DP2"),
        pytest.param({"dp": 2}, True, shared, id="DP2-shared"),
    ],
)
@pytest.mark.distributed
def test_flops_of_a_step_are_those_that_torch_counts(tiny_llama, tiny_text, tmp_path, layout, is_tied, change):
    sizes = {"dp": 1, **layout}
    replicas, ranks = sizes["dp"], max(sizes.values())
    config = on_layout(
        set_up(tiny_llama(is_tied=is_tied), tiny_text, tmp_path, change), tp=sizes.get("tp", 1), pp=sizes.get("pp", 1)
    ).resolved(ranks)
    counted = run_ranks(ranks, count_step, config)
    total = Counted(*(sum(getattr(one, name) for one in counted) for name in Counted.__dataclass_fields__))

    teacher = describe_teacher(config.model.teacher).shape
    student = method_of(config).student_shape(teacher)
    has_changed = method_of(config).change_step is not None
    copies = 1 if config.parallel.share_compose else replicas
    estimate = step_flops(config, teacher, student, replicas=copies, has_changed=has_changed)
    of_teacher, of_student = (causal_saving(config, shape) for shape in (teacher, student))
    head = teacher_head(config, teacher)
    assert estimate.projections == total.compose + total.pull_back
    assert total.compose == total.pull_back
    has_kl = config.total_kl_weight > 0
    assert estimate.teacher_forward + of_teacher == total.teacher + (head if has_kl else 0)
    # A validation makes both heads' logits in any case.
    assert estimate.student_forward + of_student == total.forward - total.teacher - head
    assert estimate.student_backward + 2 * of_student == total.step - total.forward + (0 if has_kl else head)


def teacher_head(config: Config, teacher: ModelShape) -> float:
    assert config.training.global_batch_size is not None
    return (
        2.0 * config.training.global_batch_size * config.training.seq_length * teacher.vocab_size * teacher.hidden_size
    )


def test_a_run_that_opens_before_its_first_step_composes_nothing(tiny_llama, tiny_text, tmp_path):
    config = set_up(tiny_llama(), tiny_text, tmp_path, opened_all)
    config.projection.open_after = 0
    teacher = describe_teacher(config.model.teacher).shape
    student = method_of(config).student_shape(teacher)
    found = step_flops(config, teacher, student)
    assert found.projections == 0 and found == step_flops(config, teacher, student, has_changed=True)


def test_the_whole_is_its_parts(tiny_llama, tiny_text, tmp_path):
    config = set_up(tiny_llama(), tiny_text, tmp_path, nothing_special)
    teacher = describe_teacher(config.model.teacher).shape
    one = step_flops(config, teacher, method_of(config).student_shape(teacher))
    assert one.total == one.teacher_forward + one.student_forward + one.student_backward + one.projections
    by_time = flops_by_part(config, teacher, method_of(config).student_shape(teacher))
    assert sum(by_time.values()) == one.total and min(by_time.values()) >= 0
    twice = replace(config, training=replace(config.training, global_batch_size=16))
    larger = step_flops(twice, teacher, method_of(config).student_shape(teacher))
    assert larger == StepFlops(
        2 * one.teacher_forward, 2 * one.student_forward, 2 * one.student_backward, one.projections
    )
