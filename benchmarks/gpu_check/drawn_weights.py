"""A teacher's weights drawn on the device, where 3.2 billion values take less than a second."""

import torch
from torch import Tensor

from megatron_lrc.clone.seeds import generator_of
from megatron_lrc.clone.sites import Site
from megatron_lrc.config import ModelShape
from megatron_lrc.hf.families import TeacherDescription, site_shape
from megatron_lrc.methods.ordinary.initial_weights import InitialWeights
from megatron_lrc.train.step import Run

STD = 0.02


class DrawnWeights(InitialWeights):
    """Normal, the same for the same seed and device."""

    def __init__(self, base: TeacherDescription, shape: ModelShape, device: torch.device):
        super().__init__(base, shape, std=STD, seed=0)
        self._device = device

    def _matrix(self, site: Site, layer: int | None) -> Tensor:
        seed = generator_of(0, site.name if layer is None else f"layers.{layer}.{site.name}").initial_seed()
        generator = torch.Generator(self._device).manual_seed(seed)
        size = site_shape(site, self.description.shape)
        return torch.randn(size, generator=generator, device=self._device, dtype=torch.bfloat16).mul_(STD)


@torch.no_grad()
def draw_projections(run: Run) -> None:
    """Give what is trained its first values, in the models and in the optimizer."""
    for trained in (trained for stage in run.stages for trained in stage.trained()):
        if trained.parameter.dim() == 1:  # a norm's gain
            trained.parameter.fill_(1.0)
        else:
            trained.parameter.normal_(std=STD)
    run.optimizer.optimizer.reload_model_params()
