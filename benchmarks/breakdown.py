"""Where the time of an LRC step goes: hooks on the product's own modules note when each part begins and ends.

Parts are exclusive: the clone losses, which are computed in the middle of the student's forward pass, are not counted
in it. On a GPU the notes are CUDA events, so that the device never waits for them; time that it spends waiting for the
host is the part's that is under way.
"""

import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_lrc.clone.sites import CAPTURED_LINEARS
from megatron_lrc.config import Config, ModelShape
from megatron_lrc.estimate.flops import embedding_flops, head_flops, layers_flops, step_flops
from megatron_lrc.mcore.gpt_models import layers_of
from megatron_lrc.mcore.schedules import forward_backward
from megatron_lrc.methods import method_of
from megatron_lrc.methods.lrc.paired_model import PairedModel
from megatron_lrc.train.step import Run

COMPOSE, EMBEDDING = "compose", "embeddings, forward"
TEACHER, STUDENT, CLONE = "teacher forward", "student forward", "clone losses, forward"
HEAD, BACKWARD = "LM and KL losses and their gradients", "backward, clone losses' included"
PULL_BACK, OPTIMIZER, OTHER = "pull back", "zero, reduce, clip, Adam", "other"
#: In the order of a step.
PARTS: list[str] = [COMPOSE, EMBEDDING, TEACHER, STUDENT, CLONE, HEAD, BACKWARD, PULL_BACK, OPTIMIZER, OTHER]


def flops_by_part(config: Config, teacher: ModelShape, student: ModelShape) -> dict[str, float]:
    """Part -> FLOPs of matrix products in it, of one step. The heads' gradients are made with their losses."""
    flops, training, method = step_flops(config, teacher, student), config.training, method_of(config)
    assert training.global_batch_size is not None, "the configuration has been resolved"
    tokens = training.global_batch_size * training.seq_length
    teacher_head = tokens * head_flops(teacher) if config.total_kl_weight else 0.0
    student_head = tokens * head_flops(student)
    own = method.own_matrices(has_changed=method.changes_at_once)
    embeddings = tokens * embedding_flops(teacher, student, own)
    student_layers = tokens * layers_flops(student, training.seq_length)
    return {
        COMPOSE: flops.projections / 2,
        EMBEDDING: embeddings,
        TEACHER: flops.teacher_forward - teacher_head,
        STUDENT: student_layers,
        CLONE: flops.student_forward - student_head - student_layers - embeddings,
        HEAD: teacher_head + 3 * student_head,
        BACKWARD: flops.student_backward - 2 * student_head,
        PULL_BACK: flops.projections / 2,
        OPTIMIZER: 0.0,
        OTHER: 0.0,
    }


class Timeline:
    """Notes of one step: which part begins when. Parts nest; the outer one does not count the inner one's time."""

    def __init__(self, device: torch.device):
        self.is_cuda = device.type == "cuda"
        self._open: list[str] = []
        self._notes: list[tuple[Any, str]] = []

    def enter(self, part: str) -> None:
        self._open.append(part)
        self._note()

    def leave(self) -> None:
        self._open.pop()
        self._note()

    def _note(self) -> None:
        now: Any = time.perf_counter()
        if self.is_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._notes.append((now, self._open[-1] if self._open else OTHER))

    def seconds(self) -> dict[str, float]:
        """Of each part, from the first note to the last. Forgets the notes."""
        if self.is_cuda:
            torch.cuda.synchronize()
        sums = dict.fromkeys(PARTS, 0.0)
        for (start, part), (end, _) in zip(self._notes, self._notes[1:], strict=False):
            sums[part] += start.elapsed_time(end) / 1e3 if self.is_cuda else end - start
        self._notes.clear()
        return sums


def breakdown(run: Run, batches: Iterator[dict[str, Tensor]], repeats: int) -> dict[str, list[float]]:
    """Part -> seconds in each of some steps. The run's hooks stay: what is measured afterwards would be slower."""
    (stage,) = run.stages
    assert isinstance(stage, PairedModel)
    timeline = Timeline(run.groups.device)
    watch(stage, timeline)
    steps = []
    for _ in range(repeats):
        _step(run, batches, timeline)
        steps.append(timeline.seconds())
    return {part: [step[part] for step in steps] for part in PARTS}


class Parts(Protocol):
    """What is told where a step is: a `Timeline`, or what counts instead of taking the time."""

    def enter(self, part: str) -> None: ...

    def leave(self) -> None: ...


def around(module: torch.nn.Module, part: str, parts: Parts) -> None:
    """Have a module's forward pass be in this part."""
    module.register_forward_pre_hook(lambda *_: parts.enter(part), prepend=True)
    module.register_forward_hook(lambda *_: parts.leave())


def watch(stage: PairedModel, parts: Parts) -> None:
    """Tell `parts` of what is in the stage's forward pass."""

    def begin_head(*_: object) -> None:
        parts.leave()
        parts.enter(HEAD)

    around(stage, EMBEDDING, parts)  # what is before the student, but for the teacher
    around(stage.teacher, TEACHER, parts)
    around(stage.student, STUDENT, parts)
    stage.student.register_forward_hook(begin_head)
    for _, layer in layers_of(stage.student):
        for name in CAPTURED_LINEARS:
            linear = layer.get_submodule(name)  # its own hook, between these two, computes the clone loss
            linear.register_forward_hook(lambda *_: parts.enter(CLONE), prepend=True)
            linear.register_forward_hook(lambda *_: parts.leave())


def _step(run: Run, batches: Iterator[dict[str, Tensor]], timeline: Timeline) -> None:
    """What `train_step` does."""

    def part(name: str, *functions: Any) -> None:
        timeline.enter(name)
        for function in functions:
            function()
        timeline.leave()

    def backward() -> None:  # and forward, whose parts are inside
        forward_backward(run.stages, batches, run.config, num_microbatches=run.num_microbatches)

    def update() -> None:
        run.optimizer.reduce_gradients(tokens)
        run.optimizer.clip_and_step()

    for stage in run.stages:
        stage.sums.reset()
    part(OPTIMIZER, run.optimizer.zero_grad, run.zero_student_grads)
    part(COMPOSE, run.compose)
    part(BACKWARD, backward)
    part(PULL_BACK, run.pull_back)
    tokens = run.stages[0].sums.main.tokens
    part(OPTIMIZER, update)
