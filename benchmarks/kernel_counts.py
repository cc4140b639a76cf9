"""Counts what a program would ask of a GPU: launches of kernels, bytes that they read and write, matrix-product FLOPs.

Nothing is computed: the program runs on tensors without values (torch's meta device), and its operations are looked at
one by one as they reach torch's dispatcher. Each is a kernel that reads its tensors once and writes its results once;
views and allocations are none. A function that the product compiles on CUDA (`clone/fusion.py`) is one kernel that
reads what it is given and writes what it gives, and as many more as there are matrix products in it, whose operands
have to be in memory. That the compiler does it so is a test's business (`tests/unit/test_fusion.py`).

The bound of a part is what it has to read and write whatever its kernels: what others have made or will read, once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_lrc.clone import fusion

OTHER = "other"
META = torch.device("meta")

#: Operations that launch nothing, beside those that torch calls views.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
#: Whose first tensor is read where the indexes say, as much as there is in the result.
_GATHERS = {"embedding", "gather", "index_select", "index"}
#: Whose first tensor is changed where the indexes say, as much as there is in the last one.
_SCATTERS = {"scatter_add_", "index_add_"}
#: That write their first tensor without reading it.
_OVERWRITES = {"copy_", "zero_", "fill_"}
#: In place -> the operation whose FLOPs torch knows.
_IN_PLACE = {"addmm_": torch.ops.aten.addmm, "baddbmm_": torch.ops.aten.baddbmm}


@dataclass(slots=True)
class Count:
    """Of a part: launches; bytes read and written, and the least of them; FLOPs of matrix products."""

    launches: float = 0
    bytes: float = 0
    least_bytes: float = 0
    flops: float = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(*(mine + others for mine, others in zip(self.values(), other.values(), strict=True)))

    def __mul__(self, factor: float) -> "Count":
        return Count(*(value * factor for value in self.values()))

    def __sub__(self, other: "Count") -> "Count":
        return self + other * -1

    def values(self) -> Iterator[float]:
        return (getattr(self, each.name) for each in fields(self))


@dataclass(slots=True)
class _Visit:
    """One stay in a part, from `enter` to `leave`. reads, writes: storage -> region of it -> bytes."""

    part: str
    count: Count = field(default_factory=Count)
    reads: dict[int, dict[tuple, int]] = field(default_factory=dict)
    writes: dict[int, dict[tuple, int]] = field(default_factory=dict)


@dataclass(slots=True)
class _Fused:
    """A compiled function under way. given: storages of its arguments. changed: those that it writes to.
    operands, products: tensors made inside, of matrix products: no part of its own kernel."""

    given: set[int]
    changed: dict[int, Tensor] = field(default_factory=dict)
    operands: list[Tensor] = field(default_factory=list)
    products: list[Tensor] = field(default_factory=list)


class KernelCounter(TorchDispatchMode):
    """A context that counts by part. Parts nest as in `breakdown.Timeline`: the outer one does not count the inner's.

    Storages are kept as long as it lives, so that none can be taken for another: without values they take no memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._open = [_Visit(OTHER)]
        self._visits = [*self._open]
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._made_in: dict[int, _Visit | None] = {}  # None: before anything was counted
        self._fused: _Fused | None = None

    def enter(self, part: str) -> None:
        self._open.append(_Visit(part))
        self._visits.append(self._open[-1])

    def leave(self) -> None:
        self._open.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.enter(name)
        yield
        self.leave()

    def counts(self) -> dict[str, Count]:
        """Part -> all of its visits together."""
        sums: dict[str, Count] = {}
        for visit in self._visits:
            visit.count.least_bytes = self._least_bytes(visit)
            sums[visit.part] = sums.get(visit.part, Count()) + visit.count
        return sums

    def _least_bytes(self, visit: _Visit) -> int:
        from_outside = (key for key in visit.reads if self._made_in[key] is not visit)
        to_outside = (key for key in visit.writes if self._made_in[key] is not visit or self._is_read_later(key, visit))
        return sum(self._size(key, visit.reads) for key in from_outside) + sum(
            self._size(key, visit.writes) for key in to_outside
        )

    def _is_read_later(self, key: int, visit: _Visit) -> bool:
        return any(key in other.reads for other in self._visits if other is not visit)

    def _size(self, key: int, touched: dict[int, dict[tuple, int]]) -> int:
        return min(sum(touched[key].values()), self._storages[key].nbytes())

    # --- what is counted ------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._note_given((args, kwargs))
        result = function(*args, **kwargs)
        for tensor in _tensors(result):
            self._made_in.setdefault(self._key(tensor), self._open[-1])
        name = function.overloadpacket.__name__
        if function.is_view or name in _FREE or not _tensors(result):
            return result
        flops = _flops(function, args, kwargs, result)
        reads, writes = _operands(function, name, args, kwargs, result)
        if self._fused is None:
            self._launch(reads, writes, flops)
        else:
            self._note_inside(self._fused, reads, writes, flops)
        return result

    def _note_inside(self, fused: _Fused, reads: "list[Access]", writes: "list[Access]", flops: float) -> None:
        fused.changed |= {key: each.tensor for each in writes if (key := self._key(each.tensor)) in fused.given}
        if flops:
            fused.operands += [each.tensor for each in reads if self._key(each.tensor) not in fused.given]
            fused.products += [each.tensor for each in writes]
            self._launch(reads, writes, flops)

    def as_one_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for a compiled `function`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            given = self._note_given((args, kwargs))
            fused = self._fused = _Fused({self._key(tensor) for tensor in given})
            try:
                result = function(*args, **kwargs)
            finally:
                self._fused = None
            products = {self._key(tensor) for tensor in fused.products}
            made = [tensor for tensor in _tensors(result) if self._key(tensor) not in products]
            writes = [*fused.changed.values(), *fused.operands, *made]
            self._launch([Access(each) for each in (*given, *fused.products)], [Access(each) for each in writes], 0)
            return result

        return call

    def _launch(self, reads: "list[Access]", writes: "list[Access]", flops: float) -> None:
        visit = self._open[-1]
        visit.count.launches += 1
        visit.count.flops += flops
        for accesses, touched in ((reads, visit.reads), (writes, visit.writes)):
            for key, region, size in {(self._key(each.tensor), each.region, each.size) for each in accesses}:
                visit.count.bytes += size
                touched.setdefault(key, {})[region] = size

    def _note_given(self, values: Any) -> list[Tensor]:
        """The tensors in it; what has not been seen before is from before anything was counted."""
        given = _tensors(values)
        for tensor in given:
            self._made_in.setdefault(self._key(tensor), None)
        return given

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._storages.setdefault(storage._cdata, storage)
        return storage._cdata


class Access:
    """What an operation reads of a tensor, or writes. size: bytes; elements that repeat others count once."""

    def __init__(self, tensor: Tensor, size: int | None = None):
        self.tensor = tensor
        self.region = (tensor.storage_offset(), tensor.shape, tensor.stride())
        self.size = _distinct_bytes(tensor) if size is None else size


def _distinct_bytes(tensor: Tensor) -> int:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * prod(size if stride else min(size, 1) for size, stride in sizes)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _operands(function: Any, name: str, args: Any, kwargs: Any, result: Any) -> tuple[list[Access], list[Access]]:
    """What an operation reads and writes, by its schema."""
    reads, writes = [], []
    for place, argument in enumerate(function._schema.arguments):
        given = _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        size = None
        if place == 0 and name in _GATHERS:
            size = sum(map(_distinct_bytes, _tensors(result)))
        elif place == 0 and name in _SCATTERS:
            size = _distinct_bytes(_tensors(args)[-1])
        accesses = [Access(tensor, size) for tensor in given]
        writes += accesses * is_written
        reads += accesses * (not (is_written and (argument.kwarg_only or name in _OVERWRITES)))
    new = zip(function._schema.returns, result if isinstance(result, tuple | list) else (result,), strict=False)
    writes += [Access(tensor) for of, made in new if of.alias_info is None for tensor in _tensors(made)]
    return reads, writes


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> float:
    packet = _IN_PLACE.get(function.overloadpacket.__name__, function.overloadpacket)
    if packet not in flop_registry:
        return 0
    if packet is torch.ops.aten.addmm:  # whose formula knows no dtype of the result
        args = args[:3]
    return flop_registry[packet](*args, **kwargs, out_val=result)


# --- a GPU that is not there --------------------------------------------------------------------------------------


class OnMeta(TorchDispatchMode):
    """A context in which tensors are made without values, whatever device is asked for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        has_device = any(argument.name == "device" for argument in function._schema.arguments)
        if "device" in kwargs or (has_device and not _tensors(args)):
            kwargs["device"] = META
        return function(*args, **kwargs)


class OperationsOfCuda(TorchFunctionMode):
    """A context in which torch takes the operations that it has on CUDA where it would decide by the device."""

    def __init__(self, counter: KernelCounter):
        super().__init__()
        self._counter = counter

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return _flash_attention(*args, **(kwargs or {}))
        if function is F.rms_norm and hasattr(torch.ops.aten, "_fused_rms_norm"):
            return _rms_norm(self._counter, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _rms_norm(
    counter: KernelCounter, x: Tensor, normalized_shape: object, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _Norm.apply(x, weight, counter)  # type: ignore[return-value]


class _Norm(torch.autograd.Function):
    """An RMSNorm that is one kernel in each direction, and keeps a number of each token, as torch's on CUDA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, counter: KernelCounter) -> Tensor:
        def normalize(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
            return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)

        result, scale = counter.as_one_kernel(normalize)(x, weight)
        ctx.save_for_backward(x, weight, scale)
        ctx.counter = counter
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        def gradients(grad: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor | None]:
            return torch.empty_like(x), None if weight is None else torch.empty_like(weight)

        return *ctx.counter.as_one_kernel(gradients)(grads[0], *ctx.saved_tensors), None


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float | None, **others: Any
) -> Tensor:
    assert others.get("attn_mask") is None
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, 0.0, is_causal, scale=scale)[0]


@contextmanager
def counting() -> Iterator[KernelCounter]:
    """Count all that happens to tensors in this context, as on CUDA."""
    counter, compiled = KernelCounter(), fusion._compiled_once
    fusion._compiled_once = counter.as_one_kernel  # type: ignore[assignment]
    Tensor.is_cuda = True  # type: ignore[assignment]  # which hides that of its base class, and is what we decide by
    try:
        with OnMeta(), OperationsOfCuda(counter), counter:
            yield counter
    finally:
        fusion._compiled_once = compiled
        del Tensor.is_cuda
