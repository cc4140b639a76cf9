"""One optimizer step, and one validation: the method in the order it happens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lrc.clone.projections import zero_gradient
from megatron_lrc.clone.sites import LAYER_SITES
from megatron_lrc.config import Config
from megatron_lrc.mcore.distributed import Groups, sum_over_world
from megatron_lrc.mcore.optimizer import ProjectionOptimizer
from megatron_lrc.mcore.paired_model import PairedModel
from megatron_lrc.mcore.schedules import forward_backward

Batches = Iterator[dict[str, Tensor]]


@dataclass(slots=True)
class Run:
    """What a training step works on."""

    config: Config
    groups: Groups
    stages: list[PairedModel]
    optimizer: ProjectionOptimizer
    num_microbatches: int

    def zero_student_grads(self) -> None:
        for stage in self.stages:
            for weight in stage.cloned_weights:
                zero_gradient(weight.student)

    def compose(self) -> None:
        """W_S <- f(W_T, P) on every stage."""
        for stage in self.stages:
            stage.projections.compose(stage.cloned_weights)

    def pull_back(self) -> None:
        """dP += f^T(W_T, dW_S) on every stage."""
        for stage in self.stages:
            stage.projections.pull_back(stage.cloned_weights)


@dataclass(frozen=True, slots=True)
class LossTotals:
    """Sums over the tokens of a global batch, the same on every rank; fp64 on the device, read at log time only."""

    lm: Tensor
    kl: Tensor
    tokens: Tensor
    clone: Tensor  # [layers, sites]

    @property
    def is_finite(self) -> bool:
        """Reads the device, which the gradient norm has to wait for anyway."""
        return bool((self.lm + self.kl + self.clone.sum()).isfinite())

    def clone_by_layer(self, config: Config) -> dict[str, list[float | None]]:
        """Term -> its clone loss in each layer, a mean over tokens; None where it is off. Waits for the device."""
        means = (self.clone / self.tokens).tolist()
        terms_on = [config.clone_terms_of(layer) for layer in range(len(means))]
        return {
            site.name: [row[column] if site.name in on else None for row, on in zip(means, terms_on, strict=True)]
            for column, site in enumerate(LAYER_SITES)
        }

    def means(self, config: Config) -> dict[str, float]:
        """`loss` and its terms, as means over tokens. Waits for the device."""
        lm, kl, clone = ((value / self.tokens).item() for value in (self.lm, self.kl, self.clone.sum()))
        total = config.loss.lm_weight * lm + config.total_kl_weight * kl + config.loss.alpha * clone
        return {"loss": total, "lm_loss": lm, "kl_loss": kl, "clone_loss": clone}


@dataclass(frozen=True, slots=True)
class StepReport:
    losses: LossTotals
    grad_norm: float
    is_updated: bool


def train_step(run: Run, batches: Batches) -> StepReport:
    """One optimizer step over all micro-batches. Trains P and norm gains; W_T is frozen, W_S is derived."""
    run.optimizer.zero_grad()  # P and gains: the gradient buffers
    run.zero_student_grads()  # dW_S accumulates over micro-batches
    _reset_losses(run.stages)

    run.compose()  # W_S <- f(W_T, P) in place, no autograd
    forward_backward(run.stages, batches, run.config, num_microbatches=run.num_microbatches)
    run.pull_back()  # dP: complete but for the data-parallel sum

    losses = _reduce_losses(run.stages)
    run.optimizer.reduce_gradients(losses.tokens)  # TP sum of gains, tied P, DP; the only division by tokens
    is_updated, grad_norm = run.optimizer.clip_and_step(may_step=losses.is_finite)  # every rank alike, or none
    if is_updated:
        run.optimizer.lr_schedule.step(1)
    return StepReport(losses, grad_norm, is_updated)


@torch.no_grad()
def evaluate(run: Run, batches: Batches, *, num_batches: int) -> LossTotals:
    """Losses over `num_batches` global batches, without training. The student is composed first."""
    _reset_losses(run.stages)
    run.compose()
    for _ in range(num_batches):
        forward_backward(run.stages, batches, run.config, num_microbatches=run.num_microbatches, forward_only=True)
    return _reduce_losses(run.stages)


def _reset_losses(stages: list[PairedModel]) -> None:
    for stage in stages:
        stage.sums.reset()


def _reduce_losses(stages: list[PairedModel]) -> LossTotals:
    """Sum over the world what each rank's stages have counted, in one small collective."""
    main = torch.stack([stage.sums.main for stage in stages]).sum(0)
    clone = torch.stack([stage.sums.clone for stage in stages]).sum(0)
    total = sum_over_world(torch.cat([main, clone.flatten()]))
    return LossTotals(total[0], total[1], total[2], total[3:].view_as(clone))
