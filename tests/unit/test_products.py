"""Products of half-precision matrices with fp32 results: by torch's own operator wherever it has it, whatever its
version says."""

import importlib.util

import pytest
import torch
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lrc.clone import products


class OnGpu(torch.Tensor):
    is_cuda = True


def loaded_with_torch(monkeypatch, version: str):
    """A copy of the module, as a process with that torch would have it."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    spec = importlib.util.find_spec(products.__name__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["2.8.0a0+5228986c39.nv25.06", "2.13.0+cu130"])
@pytest.mark.parametrize("has_operator", [True, False])
def test_the_operator_is_asked_and_not_the_version(monkeypatch, version, has_operator):
    overloads = ["default", "out", *["dtype", "dtype_out"] * has_operator]
    monkeypatch.setattr(torch._ops.OpOverloadPacket, "overloads", lambda _: overloads)
    module, used = loaded_with_torch(monkeypatch, version), []

    def wide_gemm(left, right, dtype):
        used.append(dtype)
        return (left.double() @ right.double()).to(dtype)

    monkeypatch.setattr(module, "_wide_gemm", wide_gemm)
    monkeypatch.setattr(module, "_adds_in_the_gemm", lambda _: False)
    half, wide = torch.randn(4, 4).bfloat16().as_subclass(OnGpu), torch.zeros(4, 4)
    module.wide_product(half, half)
    module.add_product(wide, half, half, is_first=True)
    module.product_with_gradient(half, wide)
    assert used == [torch.float32] * (3 * has_operator)


def test_on_cpu_the_operator_is_not_used_though_torch_may_register_it():
    half = torch.randn(3, 5).bfloat16()
    expected = half.double() @ half.double().t()
    torch.testing.assert_close(products.wide_product(half, half).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_product_is_added_without_a_temporary_where_torch_can():
    """On the meta device, which has the operators of CUDA and no numbers."""
    products._adds_in_the_gemm.cache_clear()
    device, called = torch.device("meta"), []
    half = torch.empty(16, 16, dtype=torch.bfloat16, device=device).as_subclass(OnGpu)
    wide = torch.empty(16, 16, device=device)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function)
            return function(*args, **(kwargs or {}))

    is_possible = products._adds_in_the_gemm(device)
    with Seen():
        products.add_product(wide, half, half, is_first=False)
    aten = torch.ops.aten
    assert called == ([aten.addmm.dtype_out] if is_possible else [aten.mm.dtype, aten.add_.Tensor])
    assert is_possible or TorchVersion(torch.__version__) < "2.13"
