"""The captures between teacher and student, and where the clone losses attach.

Forward hooks on the teacher's linear layers keep their outputs until the student's same layer has produced
its own; there the loss is computed and hung on the student's activation. Where the student recomputes a layer
in backward, the teacher's part is computed again too.

The outputs of linear_qkv and linear_fc1, [s, b, f/tp], have the same features in both models and are compared
as they are. Those of linear_proj (o) and linear_fc2 (down) are [s/tp, b, D] and [s/tp, b, d]: the teacher's
is projected first. Each rank adds up what it holds of a loss, a shard of the features or its own tokens;
these are partial sums over the world, which one reduction completes after backward.

Notation: s sequence, b micro-batch, f a linear's features, D teacher hidden, d student hidden; `/tp` split
over tensor parallel ranks, the sequence only with --sequence-parallel.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lrc.checkpoints import layout
from megatron_lrc.clone.energy import TypicalEnergy, relative_weights, summed_over_tp
from megatron_lrc.clone.losses import CarryLoss, CloneLoss, mean_squares, squared_errors
from megatron_lrc.clone.sites import CAPTURED_LINEARS, LAYER_SITES, Site, kept_features
from megatron_lrc.config import CLONE_TERMS
from megatron_lrc.mcore.distributed import sum_over_stage
from megatron_lrc.mcore.gpt_models import layers_of
from megatron_lrc.mcore.kernels import own_precision
from megatron_lrc.mcore.stages import Trained
from megatron_lrc.methods.lrc.layer_losses import LayerLosses, TwoModels

SITES_OF: dict[str, tuple[Site, ...]] = {
    linear: tuple(site for site in LAYER_SITES if site.linear == linear) for linear in CAPTURED_LINEARS
}


@dataclass(slots=True)
class MicroBatch:
    """What belongs to one micro-batch while it is under way.

    token_weight: [s, b], 0 for masked tokens.
    activations: the teacher's outputs that the student has yet to meet, by (layer, linear).
    inputs: arguments of the teacher's attention and MLP blocks, by (layer, block), for recomputation.
    """

    token_weight: Tensor
    activations: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    inputs: dict[tuple[int, str], tuple[tuple, dict[str, Any]]] = field(default_factory=dict)
    is_recomputing: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """A linear layer whose outputs are compared, and the sites in it that are. layer: the student's, global, from 0;
    of_teacher: the teacher's. width: features of the student's output on this rank."""

    layer: int
    of_teacher: int
    linear: str
    width: int
    teacher_layer: nn.Module
    sites: tuple[Site, ...]

    @property
    def block(self) -> str:
        """The part of a transformer layer that holds it: self_attention or mlp."""
        return self.linear.partition(".")[0]

    @property
    def teacher_block(self) -> nn.Module:
        return self.teacher_layer.get_submodule(self.block)


class CloneLosses(LayerLosses):
    """The clone losses of one stage. Micro-batches pass one after the other: `begin`, both models, `end`.
    terms_of: names, of `terms`, of the losses that are on in a layer of the student (global, from 0)."""

    terms = CLONE_TERMS

    def __init__(self, stage: TwoModels, *, terms_of: Callable[[int], set[str]]):
        super().__init__(stage)
        self._settings, self._terms_of = stage.settings, terms_of
        self._micro_batch: MicroBatch | None = None  # the one in progress
        self._site_indexes: dict[tuple[str, ...], Tensor] = {}
        self._typical = self._make_typical_energies()
        self._calibration: dict[int, TypicalEnergy] | None = None
        self.is_calibrated = not self._typical
        self._capture_activations()

    def begin(self, token_weight: Tensor) -> None:
        self._micro_batch = MicroBatch(token_weight)

    def end(self, student_hidden: Tensor) -> Tensor:
        micro_batch = self._micro_batch
        assert micro_batch is not None
        assert not micro_batch.activations, "a student layer did not meet its teacher's activation"
        # In a pipeline the forward pass of a later micro-batch may come before this one's backward: layers
        # that are recomputed have to find their own micro-batch again. Backward enters the stage here, before
        # any of them.
        if micro_batch.inputs:
            return _EnterBackward.apply(student_hidden, self, micro_batch)
        return student_hidden

    def forget(self) -> None:
        if self._calibration is not None:
            self._add_energies(self._calibration)
        self._micro_batch = None

    def enter_backward(self, micro_batch: MicroBatch) -> None:
        micro_batch.is_recomputing = True
        self._micro_batch = micro_batch

    @property
    def target_names(self) -> list[str]:
        return [
            f"layers.{place.layer}.{place.sites[0].name}"
            for place in self._places()
            if place.sites[0].projected == "output" and not self._compares_at_teacher_width(place)
        ]

    # --- the teacher's energies -----------------------------------------------------------------------------------

    def _make_typical_energies(self) -> dict[int, nn.Parameter]:
        """Layer -> fp64 [7], by LAYER_SITES: not trained, and saved with the run. Empty unless errors are relative."""
        if self._settings.loss.clone_normalization == "none":
            return {}
        device = self._stage.groups.device
        return {
            index: nn.Parameter(torch.zeros(len(LAYER_SITES), dtype=torch.float64, device=device), requires_grad=False)
            for index, _ in layers_of(self._stage.student)
        }

    def fixed(self) -> Iterator[Trained]:
        for index, typical in self._typical.items():
            name = f"{layout.ENERGIES}layers.{index}"
            yield Trained(name, name, typical, ())

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """What the teacher alone runs meanwhile decides what energies are typical. Collective at the end."""
        device = self._stage.groups.device
        calibration = self._calibration = {index: TypicalEnergy(len(LAYER_SITES), device) for index in self._typical}
        try:
            yield
        finally:
            self._calibration = None
        for index, seen in calibration.items():
            sum_over_stage(seen.total)
            self._typical[index].copy_(seen.result())
        self.is_calibrated = True

    def _add_energies(self, calibration: dict[int, TypicalEnergy]) -> None:
        assert self._micro_batch is not None
        for place in self._places():
            target = self._micro_batch.activations[place.layer, place.linear]
            token_weight = self._of_this_rank(place, self._micro_batch.token_weight)
            groups = self._stage.groups
            energy = mean_squares(target, place.sites, self._stage.heads, groups.tp.size())
            energy = summed_over_tp(energy, place.sites, groups.tp)
            calibration[place.layer].add(self._indexes(place, energy.device), energy, token_weight)

    def _weights(self, place: Place, teacher: Tensor, errors: Tensor, token_weight: Tensor) -> tuple[Tensor, Tensor]:
        """What squared errors count with in the loss, and in its gradient, each [s, b, k]. teacher: its output.
        errors: `squared_errors` of this place."""
        if not self._typical:
            weight = token_weight.unsqueeze(-1).expand_as(errors)
            return weight, weight
        tp = self._stage.groups.tp
        energy = mean_squares(teacher, place.sites, self._stage.heads, tp.size())
        energy, error = summed_over_tp(torch.stack([energy, errors]), place.sites, tp)
        typical = self._typical[place.layer].index_select(0, self._indexes(place, teacher.device))
        return relative_weights(token_weight, error, energy, typical)

    def _of_this_rank(self, place: Place, token_weight: Tensor) -> Tensor:
        """Of the tokens' weight [s, b] that of those [s/tp, b] whose outputs this rank has there."""
        if place.sites[0].projected == "output" and self._stage.student.config.sequence_parallel:
            tp = self._stage.groups.tp
            return token_weight.chunk(tp.size())[tp.rank()]
        return token_weight

    # --- captures -------------------------------------------------------------------------------------------------

    def _places(self) -> Iterator[Place]:
        """Where clone losses are."""
        teacher_layers = dict(layers_of(self._stage.teacher))
        for index, layer in layers_of(self._stage.student):
            terms, of_teacher = self._terms_of(index), self._stage.shapes.student.teacher_layer(index)
            for linear in CAPTURED_LINEARS:
                if sites := tuple(site for site in SITES_OF[linear] if site.name in terms):
                    width = layer.get_parameter(f"{linear}.weight").shape[0]
                    yield Place(index, of_teacher, linear, width, teacher_layers[of_teacher], sites)

    def _capture_activations(self) -> None:
        student_layers = dict(layers_of(self._stage.student))
        kept: set[tuple[int, str]] = set()  # blocks whose inputs are kept: one hook for both of their linears
        for place in self._places():
            layers = (place.teacher_layer, student_layers[place.layer])
            teacher_linear, student_linear = (layer.get_submodule(place.linear) for layer in layers)
            # On the linears, not on their layers: where a layer is recomputed, the hook runs in the first forward
            # pass, which autograd does not see, and once more in backward, where the loss gets its gradient.
            teacher_linear.register_forward_hook(partial(self._keep_teacher_output, place))
            student_linear.register_forward_hook(partial(self._attach_clone_loss, place))
            if self._is_recomputed(place) and (place.layer, place.block) not in kept:
                kept.add((place.layer, place.block))
                place.teacher_block.register_forward_pre_hook(
                    partial(self._keep_teacher_input, place), with_kwargs=True
                )

    def _is_recomputed(self, place: Place) -> bool:
        """Whether the student may run this linear again in backward. Attention's core has no linear in it."""
        parallel = self._settings.parallel
        if parallel.recompute_granularity == "selective":
            return place.block in parallel.recompute_modules
        return parallel.recompute_granularity == "full"

    def _keep_teacher_output(self, place: Place, module: nn.Module, inputs: tuple, output: tuple) -> None:
        assert self._micro_batch is not None
        kept = output[0]
        if place.sites[0].projected == "input":  # the other ones' are whole, and are projected
            kept = kept_features(place.linear, kept, place.width)
        self._micro_batch.activations[place.layer, place.linear] = kept

    def _keep_teacher_input(self, place: Place, module: nn.Module, args: tuple, kwargs: dict) -> None:
        assert self._micro_batch is not None
        self._micro_batch.inputs[place.layer, place.block] = (args, kwargs)

    def _teacher_output(self, place: Place) -> Tensor:
        """The teacher's activation of a place. Where the student recomputes its own, the teacher's is
        recomputed too: kept, they would take most of the memory that recomputation frees."""
        assert self._micro_batch is not None
        key, activations = (place.layer, place.linear), self._micro_batch.activations
        if key not in activations:
            args, kwargs = self._micro_batch.inputs[place.layer, place.block]
            with torch.no_grad(), own_precision(self._stage.teacher, place.of_teacher, inside=self._stage.student):
                place.teacher_block(*args, **kwargs)  # its hooks fill `activations`
        return activations.pop(key)

    def _attach_clone_loss(
        self, place: Place, module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]
    ) -> tuple[Tensor, Any]:
        """Compare a student's linear output with the teacher's of the same place, and hang the loss on it."""
        teacher = self._teacher_output(place)
        compared, target = output[0], teacher
        if place.sites[0].projected == "output":
            compared, target = self._output_pair(place, inputs[0], output[0], teacher)  # [s/tp, b, d or D]
        compared = self._with_loss(place, compared, target, teacher)
        # At the teacher's width what is compared is not what the student goes on with, but hangs on it.
        is_beside = self._compares_at_teacher_width(place)
        return CarryLoss.apply(output[0], compared) if is_beside else compared, output[1]

    def _with_loss(self, place: Place, compared: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
        """What is compared, with its losses' gradient hung on it, once the losses have been added up.

        compared, target: the pair. teacher: the teacher's output, from which the target is.
        """
        assert self._micro_batch is not None
        places = place.sites, self._stage.heads, self._stage.groups.tp.size()
        token_weight = self._of_this_rank(place, self._micro_batch.token_weight)
        with torch.no_grad():
            errors = squared_errors(compared, target, *places)
            in_loss, in_gradient = self._weights(place, teacher, errors, token_weight)
            if not self._micro_batch.is_recomputing:  # the first forward pass has counted it
                sums = (in_loss * errors).sum((0, 1), dtype=torch.float64)
                self._stage.sums.clone[place.layer].index_add_(0, self._indexes(place, sums.device), sums)
        scale = self._settings.loss.alpha * self._stage.main_loss_scale()
        return CloneLoss.apply(compared, target, in_gradient, *places, scale)

    def _compares_at_teacher_width(self, place: Place) -> bool:
        return place.sites[0].name == "o" and self._settings.loss.clone_attention_output == "teacher"

    def _output_pair(self, place: Place, attention: Tensor, student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared at o and down: at student width, or for o at the teacher's, as the flags say.

        attention: what the student's linear gets, [s, b, f/tp]; student: what it gives, [s/tp, b, d].
        target: what the teacher's gives, [s/tp, b, D].
        """
        (site,) = place.sites
        if self._compares_at_teacher_width(place):
            # forward(), not a call: the hooks of this linear belong to the teacher's own pass.
            with own_precision(self._stage.teacher, place.of_teacher, inside=self._stage.student):
                linear = place.teacher_layer.get_submodule(place.linear)
                dropped = (
                    linear.get_parameter("weight").shape[1] - attention.shape[-1]
                )  # groups of the teacher's, which come last
                through_teacher, _ = linear.forward(F.pad(attention, (0, dropped)) if dropped else attention)
            return through_teacher, target
        return student, target @ self._stage.projections.target(f"layers.{place.layer}.{site.name}")

    def _indexes(self, place: Place, device: torch.device) -> Tensor:
        """int64 [k], of its sites in LAYER_SITES; on the device once, since to send it there makes the host wait."""
        names = tuple(site.name for site in place.sites)
        if names not in self._site_indexes:
            indexes = [LAYER_SITES.index(site) for site in place.sites]
            self._site_indexes[names] = torch.tensor(indexes, device=device)
        return self._site_indexes[names]


class _EnterBackward(torch.autograd.Function):
    """The identity; its backward says which micro-batch the layers that are about to recompute belong to."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, losses: CloneLosses, micro_batch: MicroBatch) -> Tensor:
        ctx.losses, ctx.micro_batch = losses, micro_batch
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.losses.enter_backward(ctx.micro_batch)
        return grads[0], None, None
