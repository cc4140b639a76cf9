"""The weights that a model trained from scratch starts with, given out like those of a model on disk.

Megatron-LM's initialisation: matrices ~ N(0, std), those whose output is added to the residual stream (o, down) with
std / sqrt(2 L), L layers; norm gains 1, biases 0. Each matrix is drawn whole, from a seed of its own name: any layout
starts the same.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_lrc.checkpoints.layout import SITES
from megatron_lrc.clone.seeds import generator_of
from megatron_lrc.clone.sites import Site
from megatron_lrc.config import ModelShape
from megatron_lrc.hf.architectures import FROZEN_BIASES, FROZEN_NORMS, FROZEN_WIDE_NORMS
from megatron_lrc.hf.families import TeacherDescription, frozen_shape, site_shape
from megatron_lrc.hf.reader import Contents, Reader


class InitialWeights(Reader):
    """base: whose config.json the model has but for its shape."""

    def __init__(self, base: TeacherDescription, shape: ModelShape, *, std: float, seed: int):
        self.description = replace(base, shape=shape)
        self._std, self._seed = std, seed

    @property
    def files(self) -> list[Path]:
        return []

    def fingerprint(self, contents: Contents | None = None) -> str:
        return self.description.config_fingerprint

    def _rows(self, site: Site, start: int, count: int) -> Tensor:
        return self._matrix(site, None)[start : start + count]

    def _part(self, name: str, layer: int | None, rank: int, size: int) -> Tensor:
        if name in FROZEN_BIASES:
            return torch.zeros(frozen_shape(name, self.description.shape)[0] // size)
        if name in FROZEN_WIDE_NORMS:
            return self._gains(frozen_shape(name, self.description.shape)[0] // size)
        return self._matrix(SITES[name], layer).chunk(size, dim=SITES[name].split)[rank]

    def _whole(self, name: str, layer: int | None) -> Tensor:
        shape = self.description.shape
        return self._gains(shape.head_dim if name in FROZEN_NORMS else shape.hidden_size)

    def _gains(self, count: int) -> Tensor:
        """That multiply by 1, as they are stored."""
        return torch.ones(count) - self.description.shape.gain_offset

    def _place(self, key: str) -> str:
        return f"{key} of the initialisation"

    def _matrix(self, site: Site, layer: int | None) -> Tensor:
        shape, name = self.description.shape, site.name if layer is None else f"layers.{layer}.{site.name}"
        std = self._std / math.sqrt(2 * shape.num_layers) if site.projected == "output" else self._std
        return std * torch.randn(site_shape(site, shape), generator=generator_of(self._seed, name))
