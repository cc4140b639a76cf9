"""Disk space of a run's checkpoints."""

from dataclasses import dataclass

from megatron_lrc.clone.sites import LAYER_NORMS, LAYER_SITES
from megatron_lrc.config import Config, ModelShape
from megatron_lrc.estimate.activations import FP32, bytes_per_element
from megatron_lrc.estimate.stage import parameter_count


def trained_elements(teacher: ModelShape, student: ModelShape) -> int:
    """Of every P and the student's norm gains, in the whole job; a tied P counts once."""
    matrices = len(LAYER_SITES) * student.num_layers + (1 if student.is_tied else 2)
    gains = (len(LAYER_NORMS) * student.num_layers + 1) * student.hidden_size
    return matrices * teacher.hidden_size * student.hidden_size + gains


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
    only where that is what is trained."""
    trained = trained_elements(teacher, student) if config.has_teacher else parameter_count(student)
    e = bytes_per_element(config)
    state = (2 if e == FP32 else 3) * FP32
    return DiskNeed(trained * (e + state), _num_kept(config))


def _num_kept(config: Config) -> int:
    checkpoint, last = config.checkpoint, config.training.train_iters
    interval = checkpoint.save_interval or max(last, 1)
    steps = [*range(interval, last, interval), last]
    if checkpoint.keep_last is None and checkpoint.save_retain_interval is None:
        return len(steps)
    newest = set(steps[-(checkpoint.keep_last or 1) :])
    retain = checkpoint.save_retain_interval
    return len(newest | {step for step in steps if retain and step % retain == 0})
