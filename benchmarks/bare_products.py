"""The matrix products of a step, done again with nothing between them: what the machine's library of products needs for
these shapes, which is seldom what it reaches on one large square product."""

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_scaled_mm"}


class BareProducts(TorchDispatchMode):
    """As a context it notes the products that torch is asked for; `run` does them again, in their order.

    Operands of one place in a call, shape, layout and type are the same tensor in all products of `run`, so more of
    them are in the processor's cache than in a step; a result is never one of its own operands. Products inside other
    operations (attention, Transformer Engine's layers) are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any]] = []
        self._operands: dict[tuple, Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in _PRODUCTS:
            places = count()
            self._calls.append(
                (function, *tree_map_only(Tensor, lambda tensor: self._like(tensor, next(places)), (args, kwargs)))
            )
        return function(*args, **kwargs)

    def _like(self, tensor: Tensor, place: int) -> Tensor:
        """The operand that stands for this one, in its place of a call: other values, everything else alike."""
        kind = (place, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        if kind not in self._operands:
            span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            values = torch.full((span,), 1e-3, device=tensor.device).to(tensor.dtype)
            self._operands[kind] = values.as_strided(tensor.shape, tensor.stride())
        return self._operands[kind]

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def shapes(self) -> list[list[tuple[tuple[int, ...], tuple[int, ...]]]]:
        """Sizes and strides of each product's tensors."""
        calls = (tree_leaves(call[1:]) for call in self._calls)
        return [[(tuple(each.shape), each.stride()) for each in call if isinstance(each, Tensor)] for call in calls]

    @torch.no_grad()
    def run(self) -> None:
        for function, args, kwargs in self._calls:
            function(*args, **kwargs)


def products_of(step: Callable[[], Any]) -> BareProducts:
    """Those of one call."""
    with BareProducts() as products:
        step()
    return products
