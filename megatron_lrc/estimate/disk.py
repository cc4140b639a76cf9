"""Disk space of a run's checkpoints."""

import math
from dataclasses import dataclass

from megatron_lrc.clone.sites import LAYER_SITES
from megatron_lrc.config import MATRICES, Config, ModelShape
from megatron_lrc.estimate.activations import FP32, bytes_per_element
from megatron_lrc.estimate.stage import parameter_count
from megatron_lrc.hf.families import site_shape
from megatron_lrc.methods import method_of


def trained_elements(teacher: ModelShape, student: ModelShape, own: frozenset[str] = frozenset()) -> int:
    """In the whole job: of every P and the student's norm gains, and of its own matrices; a tied one counts once."""
    if own.issuperset(MATRICES):
        return parameter_count(student)
    matrices = sum(site.name not in own for site in LAYER_SITES) * student.num_layers + (1 if student.is_tied else 2)
    gains = (len(student.norms) * student.num_layers + 1) * student.hidden_size
    owned = sum(math.prod(site_shape(site, student)) for site in LAYER_SITES if site.name in own) * student.num_layers
    return matrices * teacher.hidden_size * student.hidden_size + gains + owned


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """Bytes. one: a checkpoint. count: how many there are at the end, and one more while it is written."""

    one: float
    count: int

    @property
    def total(self) -> float:
        return self.one * (self.count + 1)


def disk_need(config: Config, teacher: ModelShape, student: ModelShape) -> DiskNeed:
    """A checkpoint holds what is trained and the optimizer's state, whatever the layout; nothing of W_T, and of W_S
    only where that is what is trained. With --open-after it is of the student's end that this speaks."""
    method = method_of(config)
    own = method.own_matrices(has_changed=method.changes)
    trained = trained_elements(teacher, student, own) + method.num_beside(teacher, student)
    e = bytes_per_element(config)
    state = (2 if e == FP32 else 3) * FP32
    return DiskNeed(trained * (e + state), _num_kept(config))


def _num_kept(config: Config) -> int:
    checkpoint, last = config.checkpoint, config.train_iters
    interval = checkpoint.save_interval or max(last, 1)
    steps = [*range(interval, last, interval), last]
    if checkpoint.keep_last is None and checkpoint.save_retain_interval is None:
        return len(steps)
    newest = set(steps[-(checkpoint.keep_last or 1) :])
    retain = checkpoint.save_retain_interval
    return len(newest | {step for step in steps if retain and step % retain == 0})
