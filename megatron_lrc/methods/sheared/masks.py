"""The masks of one run of structured pruning (arXiv 2310.06694), and how they are learnt.

A mask has a log alpha (`hard_concrete.py`) for each hidden dimension of the model, or for each KV group (with its query
heads) or FFN neuron of one layer. All ranks hold all masks and take the same steps: they are small, and so nothing of
them depends on the layout. The numbers that a step draws follow from --seed, the count of steps and the mask's name.

What is minimised is the LM loss plus, for each mask, with d = (expected size - target of now) / full size,

    lambda1 * d + lambda2 * d^2

in which lambda1 and lambda2 are maximised, by the same Adam. The target goes linearly from the full size to the one
that is asked for during the first fifth of the pruning steps (the paper's 640 of 3200), and stays there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_lrc.clone.seeds import generator_of
from megatron_lrc.config import Config, ModelShape
from megatron_lrc.methods.sheared.hard_concrete import likely, probability_kept, sample

HIDDEN, GROUPS, NEURONS = KINDS = ("hidden", "groups", "neurons")

#: Share of the pruning steps in which the target goes from the full size to its own.
WARMUP_FRACTION = 0.2
#: Log alphas stay within these bounds, as in the code of arXiv 1712.01312: further out their gradients vanish.
BOUND = math.log(100)
#: Of every unit: one that is kept with a probability of 0.97.
FIRST_LOG_ALPHA = 2.0


@dataclass(frozen=True, slots=True)
class Mask:
    """One mask: name (`mask_name`), units, and how many of them are to be kept."""

    name: str
    size: int
    target: int


def mask_name(kind: str, layer: int | None) -> str:
    return kind if kind == HIDDEN else f"layers.{layer}.{kind}"


def masks_between(full: ModelShape, target: ModelShape) -> list[Mask]:
    """One for each width in which the shapes differ."""
    masks = [Mask(HIDDEN, full.hidden_size, target.hidden_size)]
    for layer in range(full.num_layers):
        masks.append(Mask(mask_name(GROUPS, layer), full.num_query_groups, target.num_query_groups))
        masks.append(Mask(mask_name(NEURONS, layer), full.ffn_hidden_size, target.ffn_hidden_size))
    return [mask for mask in masks if mask.target < mask.size]


class Masks:
    """All masks, one after the other in flat fp64 tensors; behind the log alphas each mask's lambda1 and lambda2.

    state: what has to be saved: `values`, Adam's moments `exp_avg` and `exp_avg_sq`, the count of `steps` [1].
    gradient: fp64 [units], this rank's partial sum of dLM / dz times dz / d log alpha.
    """

    def __init__(self, masks: list[Mask], config: Config, device: torch.device):
        self.masks, self._config = masks, config
        self._sizes = [mask.size for mask in masks]
        units = sum(self._sizes)
        values = torch.zeros(units + 2 * len(masks), dtype=torch.float64, device=device)
        values[:units] = FIRST_LOG_ALPHA
        moments = {name: torch.zeros_like(values) for name in ("exp_avg", "exp_avg_sq")}
        tensors = {"values": values, **moments, "steps": values.new_zeros(1)}
        self.state = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
        self.gradient = torch.zeros(units, dtype=torch.float64, device=device)
        self._drawn: tuple[int, Mapping[str, Tensor], Mapping[str, Tensor]] | None = None

    @property
    def steps(self) -> int:
        """How many the masks have taken."""
        return int(self.state["steps"].item())

    def by_mask(self, units: Tensor) -> dict[str, Tensor]:
        """Views of a flat tensor over all units: name -> [size]."""
        return dict(zip((mask.name for mask in self.masks), units.split(self._sizes), strict=True))

    @property
    def log_alpha(self) -> Tensor:
        return self.state["values"].detach()[: len(self.gradient)]

    def sampled(self) -> Mapping[str, Tensor]:
        """Name -> the z [size] of this step, fp64; the same however often it is asked for."""
        step = self.steps
        if self._drawn is None or self._drawn[0] != step:
            numbers = [self._numbers(mask, step) for mask in self.masks]
            z, slope = sample(self.log_alpha, torch.cat(numbers).to(self.log_alpha.device))
            self._drawn = step, self.by_mask(z), self.by_mask(slope)
        return self._drawn[1]

    def likely(self) -> Mapping[str, Tensor]:
        """Name -> the z [size] that stands for each mask where nothing is drawn."""
        return self.by_mask(likely(self.log_alpha))

    def kept(self) -> Mapping[str, Tensor]:
        """Name -> indices, in order, of the units with the highest scores, as many as the target is."""
        scores = self.by_mask(self.log_alpha)
        best = {name: part.sort(descending=True, stable=True).indices for name, part in scores.items()}
        return {mask.name: best[mask.name][: mask.target].sort().values for mask in self.masks}

    def _numbers(self, mask: Mask, step: int) -> Tensor:
        """From (0, 1), fp64 [size], on CPU."""
        generator = generator_of(self._config.training.seed, f"{step}:{mask.name}")
        return torch.rand(mask.size, dtype=torch.float64, generator=generator).clamp(1e-6, 1 - 1e-6)

    def add_gradient(self, name: str, dz: Tensor, start: int = 0) -> None:
        """Add what the loss's gradient by units start, start + 1, ... of this step's z is, on this rank."""
        assert self._drawn is not None
        units = slice(start, start + len(dz))
        self.by_mask(self.gradient)[name][units] += dz.double() * self._drawn[2][name][units]

    def expected_sizes(self) -> dict[str, Tensor]:
        """Name -> how many units a mask keeps, on average; fp64 scalars."""
        return {name: part.sum() for name, part in self.by_mask(probability_kept(self.log_alpha)[0]).items()}

    def targets(self) -> dict[str, float]:
        """Name -> the size that the Lagrangian drives to in this step."""
        pruning_steps = self._config.step_of(self._config.pruning.prune_after)
        warmup = max(WARMUP_FRACTION * pruning_steps, 1.0)
        share = min(self.steps / warmup, 1.0)
        return {mask.name: mask.size - share * (mask.size - mask.target) for mask in self.masks}

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """One of Adam. gradient: [units] of the mean LM loss, by log alpha; that of the Lagrangian is added here."""
        units, targets = len(gradient), self.targets()
        total = torch.zeros_like(self.state["values"])
        total[:units] = gradient
        parts, multipliers = self.by_mask(total[:units]), self.state["values"][units:].view(-1, 2)
        ascent = total[units:].view(-1, 2)
        kept, slopes = (self.by_mask(tensor) for tensor in probability_kept(self.log_alpha))
        for row, mask in enumerate(self.masks):
            excess = (kept[mask.name].sum() - targets[mask.name]) / mask.size
            lambda1, lambda2 = multipliers[row]
            parts[mask.name].add_((lambda1 + 2 * lambda2 * excess) / mask.size * slopes[mask.name])
            ascent[row] = -torch.stack([excess, excess.square()])
        self._adam(total)

    def _adam(self, gradient: Tensor) -> None:
        state, adam = self.state, self._config.optimizer
        state["steps"].add_(1)
        count = self.steps
        state["exp_avg"].lerp_(gradient, 1 - adam.adam_beta1)
        state["exp_avg_sq"].mul_(adam.adam_beta2).addcmul_(gradient, gradient, value=1 - adam.adam_beta2)
        mean = state["exp_avg"] / (1 - adam.adam_beta1**count)
        root = (state["exp_avg_sq"] / (1 - adam.adam_beta2**count)).sqrt()
        state["values"].sub_(self._config.pruning.mask_lr * mean / (root + adam.adam_eps))
        self.log_alpha.clamp_(-BOUND, BOUND)
