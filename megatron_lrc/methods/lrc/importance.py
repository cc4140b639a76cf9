"""Which KV groups and FFN neurons a slimmer student keeps: those that add most to the teacher's residual stream.

Each feature that o or down reads adds its value, times a column, to the stream. What a neuron counts is the sum of
squares of what it adds, over the calibration's tokens; what a KV group counts is that of all features of its query
heads. Where a norm stands between, that is what it adds to the norm's input, each channel multiplied by the gain. All
of it is the same on every layout, to rounding.

Notation: f the input features of a linear that writes into the stream; `/tp` split over tensor parallelism.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from megatron_lrc.checkpoints.layout import SITES
from megatron_lrc.clone.kept_rows import KeptRows
from megatron_lrc.clone.sites import WRITER_BEFORE
from megatron_lrc.config import Config
from megatron_lrc.mcore.distributed import broadcast_over_stage, sum_over_stage
from megatron_lrc.mcore.gpt_models import norm_after
from megatron_lrc.methods.lrc.calibration import Batches, run_teacher
from megatron_lrc.methods.lrc.paired_model import PairedModel


def choose_kept_rows(config: Config, stages: list[PairedModel], batches: Batches) -> list[dict[int, KeptRows]]:
    """For each of this rank's stages, by the student's layer. Collective; the teacher's rows are in their own order."""
    counted = [_Counted(stage, module) for stage in stages for _, module in stage.teachers_of_student()]
    readers = [reader for layer in counted for reader in layer.readers()]
    run_teacher(config, stages, batches, readers, calibrates_losses=False)
    layers = iter(counted)
    return [{index: next(layers).kept() for index, _ in stage.teachers_of_student()} for stage in stages]


class _Counted:
    """One of the teacher's layers, of which the student has one."""

    def __init__(self, stage: PairedModel, layer: nn.Module):
        self._stage = stage
        self._linears = [layer.get_submodule(SITES[site].linear) for site in WRITER_BEFORE.values()]
        self._norms = [norm_after(layer, norm) for norm in WRITER_BEFORE]
        self._squares = [
            torch.zeros(_columns(linear).shape[1], dtype=torch.float64, device=stage.groups.device)
            for linear in self._linears
        ]

    def readers(self) -> Iterator[tuple[nn.Module, Callable[[Tensor], None]]]:
        return zip(self._linears, (partial(_add_squares, sums) for sums in self._squares), strict=True)

    def kept(self) -> KeptRows:
        attention, ffn = map(self._added_to_stream, self._linears, self._norms, self._squares)
        groups = attention.unflatten(0, (self._stage.shapes.teacher.num_query_groups, -1)).sum(1)
        student = self._stage.shapes.student
        return KeptRows(_largest(groups, student.num_query_groups), _largest(ffn, student.ffn_hidden_size))

    def _added_to_stream(self, linear: nn.Module, norm: nn.Module | None, squares: Tensor) -> Tensor:
        """fp64 [f], the same on every rank of the stage."""
        tp, columns = self._stage.groups.tp, _columns(linear).double()
        if norm is not None:
            gain = norm.get_parameter("weight").detach().double() + self._stage.shapes.teacher.gain_offset
            columns = gain.unsqueeze(1) * columns
        added = torch.zeros(tp.size(), len(squares), dtype=torch.float64, device=squares.device)
        added[tp.rank()] = squares * columns.square().sum(0)
        return broadcast_over_stage(sum_over_stage(added.flatten()), turn=0)


def _columns(linear: nn.Module) -> Tensor:
    """[D, f/tp]"""
    return linear.get_parameter("weight").detach()


def _add_squares(sums: Tensor, inputs: Tensor) -> None:
    """sums: fp64 [f/tp], over tokens. inputs: [..., f/tp]."""
    tokens = inputs.flatten(0, -2)
    sums += tokens.to(torch.promote_types(tokens.dtype, torch.float32)).square().sum(0, dtype=torch.float64)


def _largest(counts: Tensor, number: int) -> Tensor:
    """Which so many are largest, int64 on the CPU, rising; of equal ones the first."""
    return counts.cpu().argsort(descending=True, stable=True)[:number].sort().values
