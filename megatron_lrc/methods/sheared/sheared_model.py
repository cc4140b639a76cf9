"""ShearedModel: one pipeline stage of a model that is being pruned, and then of what is left of it.

The trained matrices W are apart from the model's own, which are W times the masks (`mask_axes.py`):

    compose       W_S <- W * z                     once per optimizer step, with that step's z
    pull back     dW += dW_S * z,  dz += sum(dW_S * W)
    after_step    the masks' own Adam, on dz summed over all ranks

Only tensors that have a mask multiplied into them are there twice. In a checkpoint W has the names of
ordinary training, and the masks are beside it. `prune` cuts the model; then the stage is a `SingleModel`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lrc.clone.projections import accumulate_in_fp32, add_gradient, gradient_of, zero_gradient
from megatron_lrc.config import Config
from megatron_lrc.mcore.distributed import Groups, sum_over_world
from megatron_lrc.mcore.stages import BIASES, NORMS, Shapes, Trained, TrainedWeights
from megatron_lrc.methods.ordinary.single_model import SingleModel
from megatron_lrc.methods.sheared.mask_axes import AXES, gain_factor, mask_gradients, masked, masks_of, view
from megatron_lrc.methods.sheared.masks import GROUPS, HIDDEN, KINDS, NEURONS, Masks, mask_name

#: What a checkpoint calls the masks' state.
MASKS = "masks."
#: Kinds of unit that tensor parallelism splits.
_SPLIT = (GROUPS, NEURONS)


@dataclass(frozen=True, slots=True)
class MaskedWeight:
    """name: its row of `mask_axes.AXES`. model: the parameter that the model computes with; trained: W."""

    name: str
    layer: int | None
    model: nn.Parameter
    trained: nn.Parameter


class ShearedModel(SingleModel):
    """shapes: both of the full model. masks: of all stages of a rank, the first of which steps them."""

    def __init__(self, config: Config, shapes: Shapes, groups: Groups, dtype: torch.dtype, chunk: int, *, masks: Masks):
        super().__init__(config, shapes, groups, dtype, chunk)
        self.masks: Masks | None = masks
        if not groups.is_first_rank:  # every rank has them, and one saves them
            for tensor in masks.state.values():
                tensor.shared = True  # type: ignore[attr-defined]
        self._z = masks.likely()
        self._masked: list[MaskedWeight] = []
        for place, trained in enumerate(self._trained):
            name = _rows_of(trained)[0]
            layer = trained.layer and trained.layer[0]
            is_masked = AXES[name].is_masked or name == "norm"
            if is_masked and any(mask is not None for mask in masks_of(name, layer, self._z)):
                own = nn.Parameter(trained.parameter.detach().clone())
                self._masked.append(MaskedWeight(name, layer, trained.parameter, own))
                self._trained[place] = replace(trained, parameter=own)
                accumulate_in_fp32(trained.parameter)
        self._trained_weights = TrainedWeights(self._trained)

    @torch.no_grad()
    def adopt_weights(self) -> None:
        """Begin with the weights that the model has."""
        for weight in self._masked:
            weight.trained.copy_(weight.model)

    @property
    def trained_module(self) -> nn.Module:
        return self.student if self.masks is None else self._trained_weights

    def fixed(self) -> Iterator[Trained]:
        """The masks, which have an optimizer of their own."""
        if self.masks is not None and self._chunk == 0:
            for name, tensor in self.masks.state.items():
                yield Trained(MASKS + name, MASKS + name, tensor, ())

    def record(self) -> dict[str, Any]:
        """`mask_sizes`: kind -> how many units the masks keep on average, a mean over the layers."""
        if self.masks is None:
            return {}
        sizes: dict[str, list[float]] = {}
        for name, size in self.masks.expected_sizes().items():
            sizes.setdefault(name.rpartition(".")[2], []).append(size.item())
        return {"mask_sizes": {kind: sum(sizes[kind]) / len(sizes[kind]) for kind in KINDS if kind in sizes}}

    def zero_gradients(self) -> None:
        if self.masks is not None:
            self.masks.gradient.zero_()
        for weight in self._masked:
            zero_gradient(weight.model)

    def compose(self) -> None:
        """W_S <- W * z, with masks drawn for this step."""
        if self.masks is not None:
            self._compose(self.masks.sampled())

    def compose_for_evaluation(self) -> None:
        if self.masks is not None:
            self._compose(self.masks.likely())

    @torch.no_grad()
    def _compose(self, z: Mapping[str, Tensor]) -> None:
        self._z = z
        for trained in self._trained:
            self.overlap.parameter_is_needed(trained.parameter)
        for weight in self._masked:
            if weight.name == "norm":
                weight.model.copy_(weight.trained * gain_factor(self._z[HIDDEN]))
                continue
            own, model = (view(weight.name, tensor, self.heads) for tensor in (weight.trained, weight.model))
            model.copy_(masked(own, self._local_masks(weight)))

    def _local_masks(self, weight: MaskedWeight) -> list[Tensor | None]:
        """Of each dimension of this rank's shard."""
        masks = masks_of(weight.name, weight.layer, self._z)
        size, rank = self.groups.tp.size(), self.groups.tp.rank()
        return [
            mask.chunk(size)[rank] if mask is not None and kind in _SPLIT else mask
            for kind, mask in zip(AXES[weight.name].kinds, masks, strict=True)
        ]

    @torch.no_grad()
    def pull_back(self) -> None:
        """dW += dW_S * z, and dz. Gradients of what no mask is multiplied into are there already."""
        for weight in self._masked:  # none after the cut
            grad = gradient_of(weight.model)
            if grad is None:
                continue
            if weight.name == "norm":
                add_gradient(weight.trained, grad * gain_factor(self._z[HIDDEN]))
                continue
            grad, own = (view(weight.name, tensor, self.heads) for tensor in (grad, weight.trained.detach()))
            masks = self._local_masks(weight)
            for dim, dz in mask_gradients(grad, own, masks).items():
                self._add_mask_gradient(weight, dim, dz)
            add_gradient(weight.trained, masked(grad, masks).view_as(weight.trained))
        for weight in reversed(self._masked):
            self.overlap.gradient_is_complete(weight.trained)

    def _add_mask_gradient(self, weight: MaskedWeight, dim: int, dz: Tensor) -> None:
        assert self.masks is not None
        kind = AXES[weight.name].kinds[dim]
        assert kind is not None
        start = self.groups.tp.rank() * len(dz) if kind in _SPLIT else 0
        self.masks.add_gradient(mask_name(kind, weight.layer), dz, start)

    def after_step(self, gradient_scale: Tensor) -> None:
        if self.masks is not None and self._chunk == 0:
            self.masks.step(sum_over_world(self.masks.gradient.clone()) * gradient_scale)

    @torch.no_grad()
    def prune(self, shapes: Shapes) -> None:
        """Cut the model to `shapes`: of each width the units with the highest scores stay, and their weights
        are multiplied by their masks. What trains is new, and so has to be whatever trains it."""
        assert self.masks is not None
        kept, z, full_heads = self.masks.kept(), self.masks.likely(), self.heads
        before = self._trained
        self._masked, self.masks = [], None
        self._trained_weights = None
        self._build(shapes)
        for old, new in zip(before, self._trained, strict=True):
            for name in _rows_of(new):
                layer = new.layer and new.layer[0]
                whole = self._gather(name, view(name, old.parameter.detach(), full_heads))
                if AXES[name].is_masked:
                    whole = masked(whole, masks_of(name, layer, z))
                place = view(name, new.parameter, self.heads)
                place.copy_(self._shard(name, _selected(whole, masks_of(name, layer, kept))))
        self.student.set_is_first_microbatch()

    def _gather(self, name: str, part: Tensor) -> Tensor:
        """Over TP, where it splits groups or neurons."""
        group = self.groups.tp
        dim = _split_dim(name)
        if dim is None or group.size() == 1:
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim)

    def _shard(self, name: str, whole: Tensor) -> Tensor:
        dim = _split_dim(name)
        return whole if dim is None else whole.chunk(self.groups.tp.size(), dim)[self.groups.tp.rank()]


def _rows_of(trained: Trained) -> tuple[str, ...]:
    """The rows of `mask_axes.AXES` that a parameter has to do with."""
    if trained.groups == (BIASES,):
        return ("q_bias", "k_bias", "v_bias")
    if trained.groups == (NORMS,):
        return ("head_norm",) if trained.name.endswith(("q_norm", "k_norm")) else ("norm",)
    return trained.groups


def _split_dim(name: str) -> int | None:
    return next((dim for dim, kind in enumerate(AXES[name].kinds) if kind in _SPLIT), None)


def _selected(whole: Tensor, kept: Iterable[Tensor | None]) -> Tensor:
    for dim, indices in enumerate(kept):
        if indices is not None:
            whole = whole.index_select(dim, indices)
    return whole
