"""How much each layer of a model matters, measured on tokens: what chooses which layers a shallower student keeps.

One process, one layer's weights in memory at a time (`layer_by_layer.py`), so the figures depend on no layout.

Notation: s sequence, b sequences, h hidden, v vocabulary.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lrc.clone.rotation import Rotations
from megatron_lrc.config import ModelShape
from megatron_lrc.mcore.gpt_models import cap_logits
from megatron_lrc.mcore.layer_by_layer import LayerByLayer, world_of_one

#: Tokens whose logits exist at once.
LOGITS_AT_ONCE = 512


class HiddenStateChange(LayerByLayer):
    """`importance`: 1 - the cosine between a layer's input and output, mean over tokens, of each layer. It is called
    block influence in arXiv 2403.03853."""

    def __init__(self, shape: ModelShape, rotations: Rotations, batch: dict[str, Tensor], dtype: torch.dtype):
        super().__init__(shape, rotations, batch["tokens"], dtype)
        self.importance: list[float] = []

    def _pass_layer(self, hidden: Tensor) -> Tensor:
        passed = super()._pass_layer(hidden)
        wide = torch.promote_types(self.dtype, torch.float32)
        cosine = F.cosine_similarity(hidden.to(wide), passed.to(wide), dim=-1)
        self.importance.append(1.0 - cosine.mean(dtype=torch.float64).item())
        return passed

    def _finish(self, head: Tensor) -> None:
        """Logits are not asked for."""


class LossWithoutLayer(LayerByLayer):
    """`importance`: the LM loss, in nats per token, of the model without this one layer, less `loss`, the whole one's.

    Layer i is passed i + 1 times, by the model and by each of those that lack an earlier layer. Memory: their hidden
    states, [s, b, h] for each layer and one more.
    """

    def __init__(self, shape: ModelShape, rotations: Rotations, batch: dict[str, Tensor], dtype: torch.dtype):
        super().__init__(shape, rotations, batch["tokens"], dtype)
        self._labels, self._weights = batch["labels"].t(), batch["loss_mask"].t()  # [s, b]
        self._without: list[Tensor] = []  # each [s, b, h], of the model without one of the layers so far
        self.importance: list[float] = []
        self.loss = float("nan")

    def _pass_layer(self, hidden: Tensor) -> Tensor:
        passed = [super(LossWithoutLayer, self)._pass_layer(other) for other in (hidden, *self._without)]
        self._without = [*passed[1:], hidden]
        return passed[0]

    def _finish(self, head: Tensor) -> None:
        head = head.to(self._hidden.device, self.dtype)
        self.loss = self._loss(self._hidden, head)
        self.importance = [self._loss(hidden, head) - self.loss for hidden in self._without]

    def _loss(self, hidden: Tensor, head: Tensor) -> float:
        """In nats per token that counts. hidden: [s, b, h]; head: [v, h]."""
        tokens = self._final_norm(hidden).flatten(0, 1).split(LOGITS_AT_ONCE)
        labels, weights = (of.to(hidden.device).flatten().split(LOGITS_AT_ONCE) for of in (self._labels, self._weights))
        total = hidden.new_zeros((), dtype=torch.float64)
        for part, label, weight in zip(tokens, labels, weights, strict=True):
            logits = F.linear(part, head).to(torch.promote_types(self.dtype, torch.float32))
            cap_logits(logits.div_(self.shape.logits_scaling), self.shape)
            total += (F.cross_entropy(logits, label, reduction="none") * weight).sum(dtype=torch.float64)
        return (total / self._weights.sum(dtype=torch.float64).to(hidden.device)).item()


#: What --layer-importance names.
MEASURES: dict[str, type[HiddenStateChange] | type[LossWithoutLayer]] = {
    "hidden-state": HiddenStateChange,
    "loss": LossWithoutLayer,
}


def layer_importance(
    measure: str,
    weights: Iterable[tuple[str, Tensor]],
    shape: ModelShape,
    rotations: Rotations,
    batch: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Of each layer; the larger, the more it matters. measure: one of MEASURES. weights: as `LayerByLayer.add` takes
    them. batch: tokens and labels, int64 [b, s], and loss_mask [b, s]. dtype: of the arithmetic."""
    with world_of_one():
        forward = MEASURES[measure](shape, rotations, batch, dtype)
        for key, weight in weights:
            forward.add(key, weight)
        return forward.importance
