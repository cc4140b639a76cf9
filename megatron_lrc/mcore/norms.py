"""RMSNorms that megatron-core has not, and what adds a block's output to the residual stream.

A norm of what a block gives stands where megatron-core has its bias-dropout-add. Notation: s sequence, b micro-batch, h
hidden, c features of a head; `/tp` split over tensor parallelism.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

Adding = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with megatron-core's constructor. The gain is replicated over TP, its gradient partial."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps, device=_device(config), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class ZeroCenteredRMSNorm(RMSNorm):
    """The same, where the stored gain w multiplies by 1 + w, in fp32 or better: half precision has no room for w beside
    1."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.normalized_shape, 1.0 + self.weight.to(wide), self.eps).to(x.dtype)


class WideRMSNorm(nn.Module):
    """RMSNorm over all heads of q or k together, of which each tensor parallel rank has its own, with their gains."""

    num_heads: int  # on all ranks

    @classmethod
    def over(cls, num_heads: int) -> type["WideRMSNorm"]:
        """A class: some versions of megatron-core build a norm from a spec, and others call what they are given."""
        return type(cls.__name__, (cls,), {"num_heads": num_heads})

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        """hidden_size: c."""
        super().__init__()
        self.eps, self._num_features = eps, self.num_heads * hidden_size
        own = self._num_features // config.tensor_model_parallel_size
        self.weight = nn.Parameter(torch.ones(own, device=_device(config), dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, heads/tp, c], all of the sequence on each rank."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum((-2, -1), keepdim=True)
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            # Every rank's output depends on the sum, so that its gradients have to be added up on the way back, too.
            squares = reduce_from_tensor_model_parallel_region(squares)
            squares = copy_to_tensor_model_parallel_region(squares)
        normed = wide * (squares / self._num_features + self.eps).rsqrt()
        return (normed * self.weight.view(x.shape[-2:])).to(x.dtype)


class AddNormed(nn.Module):
    """In place of megatron-core's bias-dropout-add: what a block gives is normed, then added to the residual stream."""

    def __init__(self, norm: type[RMSNorm], config: TransformerConfig, hidden_size: int, eps: float, multiplier: float):
        super().__init__()
        self.norm = norm(config, hidden_size, eps)
        self._add = adds_multiple(multiplier)(False, False)

    def forward(self, is_training: bool, is_fused: bool) -> Adding:
        return self.add

    def add(self, output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_with_bias
        # megatron-core has gradients on around this, in a validation too, where layer after layer would be kept.
        with torch.set_grad_enabled(output.requires_grad or residual.requires_grad):
            return self._add((self.norm(output), bias), residual, dropout)


def adds_multiple(multiplier: float) -> Callable[[bool, bool], Adding]:
    """In place of megatron-core's bias-dropout-add, for blocks without bias and dropout: what a block gives is
    multiplied before it is added to the residual stream [s/tp, b, h]."""

    def choose(is_training: bool, is_fused: bool) -> Adding:
        return add

    def add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_with_bias
        assert bias is None and not dropout
        return torch.add(residual, output, alpha=multiplier)

    return choose


def _device(config: TransformerConfig) -> torch.device | str | int:
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
