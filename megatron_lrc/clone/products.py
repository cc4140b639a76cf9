"""Matrix products of half-precision operands whose results are fp32 and were never narrower.

CUDA has GEMMs for that, if torch has the operator (`has_wide_gemm`). Elsewhere operands are widened, a block of rows at
a time where they are large. fp32 and fp64 operands take the plain way.
"""

import functools

import torch
from torch import Tensor

#: A torch release that has the operator, for messages. Versions do not tell: NVIDIA's 2.8.0a0 has it too.
WIDE_GEMM_TORCH = "2.8"

#: Rows of a head that are widened at once.
ROWS_AT_ONCE = 8192


def has_wide_gemm() -> bool:
    """Whether torch has the operator that multiplies half-precision operands into an fp32 result. Only CUDA has a
    kernel for it: torch 2.13's CPU build registers it too, and cannot run it."""
    return "dtype" in torch.ops.aten.mm.overloads()


def _wide_gemm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mm(left, right, out_dtype=dtype)  # type: ignore[call-overload]


def _add_wide_gemm(total: Tensor, left: Tensor, right: Tensor) -> None:
    if _adds_in_the_gemm(total.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)  # type: ignore[call-overload]
    else:
        total += _wide_gemm(left, right, total.dtype)


@functools.cache
def _adds_in_the_gemm(device: torch.device) -> bool:
    """Whether torch adds such a product to a wide matrix. The first releases with the operator take a narrow one only,
    and no schema says so: it is tried once."""
    narrow, wide = (torch.zeros(16, 16, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.addmm(wide, narrow, narrow, out_dtype=wide.dtype, out=wide)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        return False
    return True


def wide_product(hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden [n, d] @ rows [v, d]^T -> [n, v] in fp32 (fp64 for fp64), never rounded to the operands' dtype."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.is_cuda and hidden.dtype == wide:
        return hidden @ rows.t()
    if hidden.is_cuda and has_wide_gemm():
        return _wide_gemm(hidden, rows.t(), wide)
    product, wide_hidden = _rows_apart(hidden, len(rows), wide), hidden.to(wide)
    at_once = max(1, len(rows)) if rows.dtype == wide else ROWS_AT_ONCE
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        torch.mm(wide_hidden, rows[part].to(wide).t(), out=product[:, part])
    return product


def _rows_apart(like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [n, width] whose rows each begin a cache line further from a page's start. Those of a vocabulary of
    49,152 would all begin at the same place of a page, and push each other out of a CPU's cache while a GEMM writes
    them."""
    page, line = 4096 // dtype.itemsize, 64 // dtype.itemsize
    return like.new_empty(len(like), -(-width // page) * page + line, dtype=dtype)[:, :width]


def add_product(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """total += left @ right, without a temporary of the total's size where the dtypes allow it. is_first: total = left
    @ right, whatever was there."""
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total) if is_first else total.addmm_(left, right)
    elif is_first:
        total.zero_()
        add_product(total, left, right, is_first=False)
    elif left.is_cuda and has_wide_gemm():
        _add_wide_gemm(total, left, right)
    else:
        total += left @ right


def product_with_gradient(matrix: Tensor, gradient: Tensor) -> Tensor:
    """matrix [m, k] @ gradient [k, n] in the gradient's dtype, which may be the wider one.

    On CUDA a bf16 matrix meets the gradient rounded to bf16, once, after all micro-batches have been added up: its
    products are added up in fp32, and fp32 operands would take ten times as long (half of a step, where it has few
    micro-batches). fp16 could not hold a scaled gradient.
    """
    if matrix.dtype == gradient.dtype:
        return matrix @ gradient
    if matrix.is_cuda and matrix.dtype == torch.bfloat16 and has_wide_gemm():
        return _wide_gemm(matrix, gradient.to(matrix.dtype), gradient.dtype)
    return matrix.to(gradient.dtype) @ gradient
