"""RoPE of a GPTModel's layers, which `Rotations` may have otherwise than megatron-core's own in three things.

* Part of a head: megatron-core, and Transformer Engine's kernel, rotate as many features as the table of angles has.
* A factor of cos and sin: megatron-core knows it as YaRN's concentration factor, one for all layers; here each
  attention gets its own (`compat.scale_rotation`).
* Layers of two kinds: a model hands one tensor of angles to all its layers, through recomputation too. So it holds
  those of both kinds, one above the other, and each layer takes its part.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn

from megatron_lrc.clone.rotation import Rotations
from megatron_lrc.config import ModelShape
from megatron_lrc.mcore.compat import scale_rotation


def set_rotations(model: GPTModel, shape: ModelShape, rotations: Rotations, *, by_position: bool) -> None:
    """Have the layers of this stage of a model of `shape` rotated so. by_position: by the position ids that the model
    is called with, which may begin anew within a sequence."""
    kinds = [rotations.full, rotations.sliding] if rotations.differ else [rotations.full]
    tables: list[Any] = [with_frequencies(model.rotary_pos_emb, rotation.frequencies) for rotation in kinds]
    if by_position:
        tables = [RotaryByPosition(model, table) for table in tables]
    model.rotary_pos_emb = RotaryOfKinds(tables) if rotations.differ else tables[0]
    for layer in model.decoder.layers:
        rotation = rotations.of_layer(shape, int(layer.layer_number) - 1)
        if rotations.differ:
            own_part = partial(_take_part, kinds.index(rotation), len(kinds))
            # Not of its attention, which may be called again with what a call of it was given.
            layer.register_forward_pre_hook(own_part, with_kwargs=True)
        if rotation.factor != 1.0:
            scale_rotation(layer.self_attention, rotation.factor)


def with_frequencies(rotary: Any, frequencies: Tensor) -> Any:
    """megatron-core's table of angles, of these frequencies, float32 [c / 2]."""
    rotary = copy.copy(rotary)
    rotary.inv_freq = frequencies.to(rotary.inv_freq.device)
    return rotary


class RotaryOfKinds(nn.Module):
    """Angles of several kinds of layers, each from its own table, one above the other."""

    def __init__(self, tables: Sequence[Any]):
        super().__init__()
        self.tables = tables

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        return self.tables[0].get_rotary_seq_len(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """[kinds * s, 1 or b, 1, c], fp32, of this rank's tokens."""
        return torch.cat([table(*args, **kwargs) for table in self.tables])


def _take_part(
    place: int, count: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook: the part of the angles that is this layer's."""
    return args, kwargs | {"rotary_pos_emb": kwargs["rotary_pos_emb"].chunk(count)[place]}


class RotaryByPosition(nn.Module):
    """RoPE by the position ids that a GPTModel is called with, which megatron-core's own does not look at.
    rotary: megatron-core's, whose table it reads."""

    def __init__(self, model: GPTModel, rotary: Any):
        super().__init__()
        self.rotary = rotary
        self.position_ids: Tensor | None = None
        model.register_forward_pre_hook(self._keep_position_ids)

    def _keep_position_ids(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self.position_ids = args[1]

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        return self.rotary.get_rotary_seq_len(*args, **kwargs)

    def forward(self, sequence_length: int, **kwargs: Any) -> Tensor:
        """Angles [s, b, 1, c], fp32, of this rank's tokens. sequence_length: of all context parallel ranks together."""
        assert self.position_ids is not None
        table = self.rotary.get_emb(sequence_length)  # [sequence, 1, 1, c]
        return table[self.position_ids.t(), 0]
