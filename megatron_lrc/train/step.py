"""One optimizer step, one validation, and what they report: the method in the order it happens."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_lrc.config import Config
from megatron_lrc.mcore.delayed_scaling import kept_scaling_state
from megatron_lrc.mcore.distributed import Groups, sum_over_world
from megatron_lrc.mcore.gradient_norms import group_gradient_norms
from megatron_lrc.mcore.optimizer import StageOptimizer
from megatron_lrc.mcore.schedules import forward_backward
from megatron_lrc.mcore.stages import MainSums, PipelineStage
from megatron_lrc.methods import Method

Batches = Iterator[dict[str, Tensor]]


@dataclass(slots=True)
class Run:
    """What a training step works on."""

    method: Method
    groups: Groups
    stages: Sequence[PipelineStage]
    optimizer: StageOptimizer
    num_microbatches: int

    @property
    def config(self) -> Config:
        return self.method.config

    def zero_student_grads(self) -> None:
        for stage in self.stages:
            stage.zero_gradients()

    def compose(self) -> None:
        """W_S <- f(W_T, P) on every stage."""
        for stage in self.stages:
            stage.compose()

    def pull_back(self) -> None:
        """dP += f^T(W_T, dW_S) on every stage."""
        for stage in self.stages:
            stage.pull_back()


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTotals(MainSums):
    """Sums over the tokens of global batches, the same on every rank; fp64 on the device, read at log time only."""

    clone: Tensor  # [layers, terms]

    @staticmethod
    def zeros(shape: tuple[int, ...], device: torch.device) -> "LossTotals":
        """shape: (layers, terms)."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return LossTotals(**dict.fromkeys(MainSums.names(), zero), clone=zero.new_zeros(shape))

    def __add__(self, other: "LossTotals") -> "LossTotals":
        return LossTotals(**{name: value + getattr(other, name) for name, value in self.named().items()})

    @property
    def is_finite(self) -> Tensor:
        """Whether they are: 0 or 1, fp64, still on the device."""
        return (self.lm + self.kl + self.clone.sum()).isfinite().double()

    def clone_by_layer(self, method: Method) -> dict[str, list[float | None]]:
        """Term -> its clone loss in each layer, a mean over tokens; None where it is off. Waits for the device."""
        means = (self.clone / self.tokens).tolist()
        terms_on = [method.terms_of(layer) for layer in range(len(means))]
        return {
            term: [row[column] if term in on else None for row, on in zip(means, terms_on, strict=True)]
            for column, term in enumerate(method.layer_terms)
        }

    def means(self, method: Method) -> dict[str, float | None]:
        """`loss` and its terms, and the teacher's own LM loss, as means over tokens; without a teacher only what there
        is. Waits for the device."""
        sums = {"lm": self.lm, "kl": self.kl, "clone": self.clone.sum(), "teacher_lm": self.teacher_lm}
        means = method.losses(**{name: (value / self.tokens).item() for name, value in sums.items()})
        if method.config.loss.kl_top_k:
            means["kl_top_k_mass"] = (self.covered / self.tokens).item()
        return means

    def agreement(self, method: Method) -> dict[str, float]:
        """Of a validation: how far the student agrees with its teacher; empty without one. Waits for the device."""
        if not method.has_teacher:
            return {}
        return {
            "teacher_kl": (self.teacher_kl / self.tokens).item(),
            "top1_agreement": (self.same_top1 / self.tokens).item(),
        }


@dataclass(frozen=True, slots=True)
class Votes:
    """What the processes of a run tell each other in the all-reduce of each step's loss sums.

    Of one process each vote is 0 or 1; summed, each is the number of processes.

    stop: for each of `stopping.REASONS`, who asks to stop for it.
    num_writing: who is still writing a checkpoint.
    """

    stop: Sequence[float] = ()
    num_writing: float = 0

    def to_tensor(self, device: torch.device) -> Tensor:
        """[n], fp64. Does not wait for the device, as a copy from the host would."""
        votes = (*self.stop, self.num_writing)
        tensor = torch.zeros(len(votes), dtype=torch.float64, device=device)
        for place, vote in enumerate(votes):
            if vote:
                tensor[place].fill_(float(vote))
        return tensor

    @classmethod
    def from_values(cls, values: Sequence[float]) -> "Votes":
        """values: what `to_tensor` has made, read from the device."""
        return cls(values[:-1], values[-1])


@dataclass(frozen=True, slots=True)
class StepReport:
    """is_finite: whether the losses are. Gradient norms are those before clipping; by group only if asked for."""

    losses: LossTotals
    is_finite: bool
    grad_norm: float
    grad_norm_by_group: dict[str, float | None] | None
    is_updated: bool
    loss_scale: float = 1.0  # of this step; 1 without fp16
    #: overflow: gradients beyond fp16 while a lower loss scale can still be tried
    skipped_for: Literal["fault", "spike", "overflow"] | None = None
    votes: Votes = Votes()  # summed over all ranks


class Interval:
    """The steps since the last record (or since this process began): their losses, summed on the device, and how many
    there were. Steps whose losses are not finite are left out of the losses; with no other step these are NaN."""

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        """shape: (layers, terms) of the losses."""
        self._shape, self._device = shape, device
        self.reset()

    def reset(self) -> None:
        self.steps = self.skipped = 0
        self._totals = LossTotals.zeros(self._shape, self._device)

    def add(self, report: StepReport) -> None:
        self.steps += 1
        self.skipped += not report.is_updated
        if report.is_finite:
            self._totals += report.losses

    def record(self, method: Method) -> dict[str, Any]:
        """Losses as means over the interval's tokens, and `skipped_steps`. Waits for the device."""
        by_layer = {"clone_by_layer": self._totals.clone_by_layer(method)} if self._shape[0] else {}
        return {**self._totals.means(method), **by_layer, "skipped_steps": self.skipped}


def train_step(
    run: Run,
    batches: Batches,
    *,
    with_group_norms: bool = False,
    max_grad_norm: float = math.inf,
    votes: Callable[[], Votes] = Votes,
) -> StepReport:
    """One optimizer step over all micro-batches. With a teacher P and norm gains are trained, W_T is frozen and W_S
    derived; without one W_S itself is trained, and there is nothing to compose or to pull back.

    max_grad_norm: a step whose gradient norm is above it is skipped.
    with_group_norms: also give gradient norms by kind of matrix (one pass over the gradients, one small all-reduce).
    votes: asked late in the step for this process's votes, which are summed over the ranks with the losses.
    """
    run.optimizer.zero_grad()  # of what is trained: the gradient buffers
    run.zero_student_grads()  # dW_S accumulates over micro-batches
    _reset_losses(run.stages)

    run.compose()  # W_S <- f(W_T, P) in place, no autograd
    forward_backward(run.stages, batches, run.config, num_microbatches=run.num_microbatches)
    run.pull_back()  # dP: complete but for the data-parallel sum

    losses, summed_votes = _reduce_losses(run.stages, votes().to_tensor(run.groups.device))
    run.optimizer.reduce_gradients(losses.tokens)  # TP sum of gains, tied P, DP; the only division by tokens
    by_group = group_gradient_norms(run.optimizer, run.stages, run.groups) if with_group_norms else None
    # Waits for the device, which the gradient norm does anyway.
    is_finite, *vote_counts = torch.cat([losses.is_finite[None], summed_votes]).tolist()
    is_finite = bool(is_finite)
    loss_scale = run.optimizer.loss_scale  # before the step, which may change it
    is_updated, grad_norm = run.optimizer.clip_and_step(may_step=is_finite, max_norm=max_grad_norm)  # all ranks or none
    if is_updated:
        run.optimizer.lr_schedule.step(1)
        for stage in run.stages:
            stage.after_step(1 / (losses.tokens.clamp_min(1) * loss_scale))
    skipped_for = None
    if not is_updated and is_finite and math.isfinite(grad_norm):
        skipped_for = "spike"
    elif not is_updated:
        skipped_for = "overflow" if is_finite and run.optimizer.can_be_lowered(loss_scale) else "fault"
    counted = Votes.from_values(vote_counts)
    return StepReport(losses, is_finite, grad_norm, by_group, is_updated, loss_scale, skipped_for, counted)


@torch.no_grad()
def evaluate(run: Run, batches: Batches, *, num_batches: int) -> LossTotals:
    """Losses over `num_batches` global batches, without training. The student is composed first."""
    _reset_losses(run.stages)
    for stage in run.stages:
        stage.compose_for_evaluation()
    with kept_scaling_state(run.stages):
        for _ in range(num_batches):
            forward_backward(run.stages, batches, run.config, num_microbatches=run.num_microbatches, forward_only=True)
    losses, _ = _reduce_losses(run.stages)
    return losses


def _reset_losses(stages: Sequence[PipelineStage]) -> None:
    for stage in stages:
        stage.sums.reset()


def _reduce_losses(stages: Sequence[PipelineStage], votes: Tensor | None = None) -> tuple[LossTotals, Tensor]:
    """Sum over the world what each rank's stages have counted, and its votes [n], in one small collective."""
    main = torch.stack([stage.sums.main_values for stage in stages]).sum(0)
    clone = torch.stack([stage.sums.clone for stage in stages]).sum(0)
    votes = main.new_zeros(0) if votes is None else votes
    total = sum_over_world(torch.cat([main, clone.flatten(), votes]))
    main, clone_sums, votes = total.split([len(main), clone.numel(), len(votes)])
    return LossTotals(**MainSums.of(main).named(), clone=clone_sums.view_as(clone)), votes
