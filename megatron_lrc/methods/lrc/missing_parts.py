"""What a student lacks of its teacher, and what that adds to the residual stream while the teacher runs alone.

A student passes the layers that it lacks unchanged, and what o and down write in its others is written without the KV
groups and FFN neurons that these lack. So if all that it has gave what the same part of the teacher gives, its residual
stream would be the teacher's without what the rest has added: that is what a closed-form start fits its projections to
read.

Notation: s sequence, b micro-batch, D teacher hidden, d student hidden, f input features of o or down, of which the
student lacks g; `/tp` split over tensor parallelism.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_lrc.checkpoints.layout import SITES
from megatron_lrc.clone.sites import WRITER_BEFORE
from megatron_lrc.config import ModelShape
from megatron_lrc.mcore.distributed import sum_over_tp
from megatron_lrc.mcore.gpt_models import norm_after


class MissingParts:
    """Of one stage. `added` [s/tp, b, d]: the sum so far in this micro-batch, in a basis; 0.0 where there is none.

    It travels between stages in the place of the student's hidden state.
    """

    def __init__(
        self,
        skipped: Iterable[nn.Module],
        pairs: Iterable[tuple[nn.Module, nn.Module]],
        teacher: ModelShape,
    ):
        """skipped: layers of the teacher that the student has not. pairs: the others, each beside the student's."""
        self._shape = teacher
        self._skipped = list(skipped)
        self._writers = [
            (*(layer.get_submodule(SITES[site].linear) for layer in pair), norm_after(pair[0], norm))
            for pair in pairs
            for norm, site in WRITER_BEFORE.items()
        ]
        self.added: Tensor | float = 0.0

    def begin(self, received: Tensor | None) -> None:
        """A micro-batch begins. received: what the stages before have added, [s/tp, b, d]; None on the first one."""
        self.added = 0.0 if received is None else received

    def follow(self, basis: Tensor) -> Iterator[RemovableHandle]:
        """From now on, until these hooks are removed, add up. basis: Q [D, d]."""
        for layer in self._skipped:
            yield layer.register_forward_hook(partial(self._add_layer, basis), with_kwargs=True)
        for of_teacher, of_student, norm in self._writers:
            columns, kept = (linear.get_parameter("weight") for linear in (of_teacher, of_student))  # [D or d, f/tp]
            missing = columns.detach()[:, kept.shape[1] :]  # the kept ones come first
            if missing.numel():
                dtype = torch.promote_types(missing.dtype, torch.float32)
                written = basis.to(dtype) * self._shape.residual_multiplier
                if norm is not None:
                    gain = norm.get_parameter("weight").detach().to(dtype) + self._shape.gain_offset
                    written = gain.unsqueeze(1) * written
                into_basis = missing.t().to(dtype) @ written  # [g/tp, d]
                yield of_teacher.register_forward_hook(partial(self._add_features, into_basis, norm is not None))

    def _add_layer(self, basis: Tensor, layer: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        before, after = args[0] if args else kwargs["hidden_states"], output[0]  # [s/tp, b, D]
        dtype = torch.promote_types(after.dtype, torch.float32)
        self.added = self.added + (after.to(dtype) - before.to(dtype)) @ basis.to(dtype)

    def _add_features(
        self, into_basis: Tensor, is_normed: bool, linear: nn.Module, inputs: tuple, output: tuple
    ) -> None:
        partial_sum = inputs[0][..., -len(into_basis) :].to(into_basis) @ into_basis  # [s, b, d]
        is_scattered = output[0].shape[0] != partial_sum.shape[0]
        added = sum_over_tp(partial_sum, is_scattered=is_scattered)
        if is_normed:  # the rest of the block's output goes through the same norm
            mean_square = output[0].to(added).square().mean(-1, keepdim=True)
            added = added * (mean_square + self._shape.norm_epsilon).rsqrt()
        self.added = self.added + added
