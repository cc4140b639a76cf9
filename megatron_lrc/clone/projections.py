"""Projections: every trained P of one pipeline stage, and the student's norm gains.

    compose     W_S <- f(W_T, P)                 once per optimizer step, in place, outside autograd
    forward, backward over all micro-batches     dW_S gathers in the student's parameters, like any model's
    pull_back   dP += f^T(W_T, dW_S)             once per step: exact, because f is linear in P

Sharding: P is (D, d); each tensor parallel rank holds D/tp rows, with their gradient and optimizer state.
`compose` gathers the whole P, which any shard of W_T needs; `pull_back` gives each rank the sum over ranks of
its rows.

The clone loss projects the teacher's o and down outputs with the same P. That use goes through autograd:
`target(name)` is a leaf that shares P's values, and what reaches it is added to dP by `pull_back`. So does the
embedding of a student whose head is another matrix: rows are looked up in the teacher's, and then projected, so
that neither W_S nor dW_S of the vocabulary's size exists.

Notation: D teacher hidden, d student hidden, tp tensor parallel size.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lrc.clone.overlap import Overlap
from megatron_lrc.clone.sharing import Sharing
from megatron_lrc.clone.sites import HeadLayout, Site, compose_into, kept_part, pull_back, select


@dataclass(frozen=True, slots=True)
class ClonedWeight:
    """A student weight and where it comes from. Fused weights have one entry for each of their sites.

    projection: global name of the P that generates it (`embed` also for the LM head of a tied student).
    is_own: no longer, or never, generated: the student has it as its own.
    is_looked_up: rows of the teacher's are projected as they are needed, through a target; the student's is not there.
    teacher, student: this rank's shards of the whole, maybe fused, matrices, which differ in one width; where the
    student keeps not all of the teacher's groups and neurons (`kept_rows`), in both.
    """

    projection: str
    site: Site
    teacher: Tensor
    student: nn.Parameter
    heads: HeadLayout
    is_own: bool = False
    is_looked_up: bool = False

    @property
    def is_composed(self) -> bool:
        return not (self.is_own or self.is_looked_up)


def accumulate_in_fp32(parameter: Tensor) -> None:
    """Collect a low-precision leaf's gradients of all micro-batches in fp32, in `.main_grad` (megatron-core's name).

    fp32 and fp64 leaves need nothing: autograd accumulates in `.grad`. Read either with `gradient_of`.

    Transformer Engine's GEMMs may add to `main_grad` themselves. What they then hand to autograd is nothing
    (the hook runs all the same), or, where the leaf has `grad_added_to_main_grad`, a tensor without meaning,
    which that marks.
    """
    if torch.finfo(parameter.dtype).bits >= 32:
        return
    parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]

    def add_to_main_grad(leaf: Any) -> None:
        if getattr(leaf, "grad_added_to_main_grad", False):
            leaf.grad_added_to_main_grad = False  # said of this one gradient
        elif leaf.grad is not None:
            leaf.main_grad.add_(leaf.grad)
        leaf.grad = None

    parameter.register_post_accumulate_grad_hook(add_to_main_grad)


def gradient_of(parameter: Tensor) -> Tensor | None:
    """What has come since `zero_gradient`, in fp32 or better; None if nothing has reached the leaf."""
    return getattr(parameter, "main_grad", parameter.grad)


def zero_gradient(parameter: Tensor) -> None:
    parameter.grad = None
    if hasattr(parameter, "main_grad"):
        parameter.main_grad.zero_()  # type: ignore[attr-defined]


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to the gradient of a trained parameter what autograd does not bring there."""
    if hasattr(parameter, "main_grad"):  # the distributed data parallel buffer
        parameter.main_grad.add_(gradient)  # type: ignore[attr-defined]
    elif parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ParameterDict key may hold no dot


class Projections(nn.Module):
    """The trainable part of one stage.

    names: global names of this stage's projections (`sites.projection_names`).
    fixed: those that are not trained and make no weight any more, but project the clone loss's targets.
    norms: global name -> the student's gain, held by reference.
    tp_group: shards every P on its first dimension; None is a group of one.
    sharing: which of the matrices this replica composes and pulls back.
    gain_offset: what a norm adds to its gain (`ModelShape.gain_offset`).
    """

    def __init__(
        self,
        names: Sequence[str],
        norms: dict[str, nn.Parameter],
        *,
        fixed: Collection[str] = (),
        teacher_size: int,
        student_size: int,
        tp_group: ProcessGroup | None,
        dtype: torch.dtype,
        device: torch.device,
        sharing: Sharing | None = None,
        gain_offset: float = 0.0,
    ):
        super().__init__()
        self.tp_group = tp_group if tp_group is not None and tp_group.size() > 1 else None
        self.tp_size = self.tp_group.size() if self.tp_group else 1
        self.tp_rank = self.tp_group.rank() if self.tp_group else 0
        self.teacher_size, self.student_size = teacher_size, student_size
        self._gain_offset = gain_offset
        # First, so that DDP puts them into the bucket that is complete last: one is before the first layer.
        self.norms = nn.ParameterDict({_key(name): gain for name, gain in norms.items()})
        size = (teacher_size // self.tp_size, student_size)
        self.matrices = nn.ParameterDict(
            {_key(name): nn.Parameter(torch.zeros(size, dtype=dtype, device=device)) for name in names}
        )
        for name in fixed:
            self.matrices[_key(name)].requires_grad_(False)
        self._targets: dict[str, Tensor] = {}
        self._are_detached: dict[str, bool] = {}  # of the names in use as targets
        self.overlap = Overlap()
        self.sharing = sharing or Sharing()
        self._waiting: deque[ClonedWeight] = deque()  # whose gradients have come, and whose sums have begun

    def attach(self, overlap: Overlap, weights: Iterable[ClonedWeight]) -> None:
        """From now on tell this `overlap` what is needed and what is complete. weights: as of `pull_back`."""
        self.overlap = overlap
        made = {weight.projection: weight for weight in weights if not weight.is_own}
        overlap.watch_weights(
            {name: weight.student for name, weight in made.items() if weight.is_composed},
            [name for name, is_detached in self._are_detached.items() if not is_detached],
            lambda name: self._gradient_has_come(made[name]),
        )

    def named_matrices(self) -> Iterable[tuple[str, nn.Parameter]]:
        """(global name, this rank's shard [D/tp, d]) of each projection."""
        return ((key.replace("/", "."), matrix) for key, matrix in self.matrices.items())

    def named_norms(self) -> Iterable[tuple[str, nn.Parameter]]:
        """(global name, gain [d]) of each of the student's norms."""
        return ((key.replace("/", "."), gain) for key, gain in self.norms.items())

    @torch.no_grad()
    def set_gain(self, name: str, effective: Tensor | float) -> None:
        """Have a norm multiply by this, [d] or one number for all."""
        gain = self.norms[_key(name)]
        gain.copy_(torch.as_tensor(effective, dtype=torch.float64, device=gain.device) - self._gain_offset)

    @torch.no_grad()
    def effective_gain(self, name: str) -> Tensor:
        """What a norm multiplies by, [d], fp64."""
        return self.norms[_key(name)].double() + self._gain_offset

    def matrix(self, name: str) -> nn.Parameter:
        """This rank's shard [D/tp, d]."""
        return self.matrices[_key(name)]

    @torch.no_grad()
    def set_matrix(self, name: str, full: Tensor) -> None:
        """Set a projection from the whole (D, d) matrix: this rank keeps its rows."""
        shard = self.matrices[_key(name)]
        shard.copy_(full.chunk(self.tp_size, dim=0)[self.tp_rank])

    @torch.no_grad()
    def full(self, name: str) -> Tensor:
        """The whole P [D, d], gathered over tensor parallel ranks; P itself where there is one rank."""
        shard = self.matrices[_key(name)].detach()
        if self.tp_group is None:
            return shard
        gathered = shard.new_empty(self.teacher_size, self.student_size)
        dist.all_gather_into_tensor(gathered, shard.contiguous(), group=self.tp_group)
        return gathered

    def add_target(self, name: str, *, is_detached: bool) -> None:
        """Have `compose` make a target of a projection; is_detached: one that passes no gradient to it."""
        self._are_detached[name] = is_detached or not self.matrices[_key(name)].requires_grad

    def target(self, name: str) -> Tensor:
        """The leaf [D, d] by which the clone loss projects the teacher's outputs; renewed by `compose`."""
        return self._targets[name]

    @torch.no_grad()
    def compose(self, weights: Iterable[ClonedWeight]) -> None:
        """W_S <- f(W_T, P), in the order of `weights`, for every student weight that is composed; and the targets,
        whose gradients are forgotten. The parts of a fused weight follow each other. What other replicas compose
        is on its way: `sharing.await_matrices`."""
        # Targets of projections that are fixed stay as the first composition has made them.
        self._targets = {name: leaf for name, leaf in self._targets.items() if not self.matrix(name).requires_grad}
        fixed = set(self._targets)
        for _, parts in groupby(weights, key=lambda weight: id(weight.student)):
            of_matrix = list(parts)
            for weight in of_matrix:
                self._compose_one(weight, fixed)
            self.sharing.send(of_matrix[0].student)

    def _compose_one(self, weight: ClonedWeight, fixed: Collection[str]) -> None:
        name = weight.projection
        is_target = name in self._are_detached and name not in fixed
        if weight.is_own and not is_target:
            return
        self.overlap.parameter_is_needed(self.matrix(name))
        is_made_here = weight.is_composed and self.sharing.is_mine(weight.student)
        if not (is_made_here or is_target):
            return
        projection = self.full(name)
        if is_made_here:
            student = select(weight.site, weight.student, weight.heads)
            teacher = kept_part(weight.site, select(weight.site, weight.teacher, weight.heads), student)
            compose_into(student, weight.site, teacher, projection)
        if is_target:
            self._targets[name] = leaf = projection.detach()
            if not self._are_detached[name]:
                accumulate_in_fp32(leaf.requires_grad_())
                self.overlap.watch_target(name, leaf)

    @torch.no_grad()
    def pull_back(self, weights: Sequence[ClonedWeight]) -> None:
        """dP += f^T(W_T, dW_S), for every weight of which that is not done in this step, with what the clone
        targets have gathered. Each P has one weight on a stage. From the last matrix to the first: in this
        order megatron-core's DDP fills its buckets."""
        others = [weight for weight in reversed(weights) if not weight.is_own]
        others = [weight for weight in others if not self.overlap.is_pulled_back(weight.projection)]
        for weight in others:
            self._begin_sum(weight)
        for weight in (*self._waiting, *others):
            self.pull_back_one(weight)
        self._waiting.clear()
        self.sharing.end_sums()

    def _begin_sum(self, weight: ClonedWeight) -> None:
        if weight.is_composed:
            self.sharing.begin_sum(weight.student, gradient_of(weight.student))

    def _gradient_has_come(self, weight: ClonedWeight) -> None:
        """Backward has left all of it: pull back, or, where replicas sum it first, what has come some time before."""
        self._begin_sum(weight)
        self._waiting.append(weight)
        if len(self._waiting) > self.sharing.behind:
            self.pull_back_one(self._waiting.popleft())

    @torch.no_grad()
    def pull_back_one(self, weight: ClonedWeight) -> None:
        """The same of one weight. Per rank a partial sum over tensor parallel ranks (each has a shard of W_T,
        and its own tokens' targets); summed here."""
        shard, partials = self.matrix(weight.projection), []
        is_mine = weight.is_composed and self.sharing.is_mine(weight.student)
        if is_mine and (grad := gradient_of(weight.student)) is not None:
            self.sharing.await_sum(weight.student)
            student_grad = select(weight.site, grad, weight.heads)
            teacher = kept_part(weight.site, select(weight.site, weight.teacher, weight.heads), student_grad)
            partials.append(pull_back(weight.site, teacher, student_grad))
        if weight.projection in self._targets:
            target_grad = gradient_of(self._targets[weight.projection])
            if target_grad is not None:
                partials.append(target_grad)
        if partials:
            self._add_gradient(shard, partials[0].add_(partials[1]) if len(partials) > 1 else partials[0])
        self.overlap.gradient_is_complete(shard)

    def _add_gradient(self, shard: nn.Parameter, partial: Tensor) -> None:
        """Sum `partial` [D, d] over tensor parallel ranks and add this rank's rows to its gradient."""
        if self.tp_group is not None:
            rows = partial.new_empty(shard.shape)
            dist.reduce_scatter_tensor(rows, partial.contiguous(), group=self.tp_group)
            partial = rows
        add_gradient(shard, partial)
