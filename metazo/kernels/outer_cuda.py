"""out = beta * base + alpha * left right^T on CUDA with triton, for thin factors: all matrices in one launch.

The sums have the order of the compiled loop of outer.py, and nothing is fused, so that the results are the same, bit for bit.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (pyright checks triton kernels as the Python functions that they are before compilation)

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from metazo.kernels.launches import as_float, ends, find, table

_ROWS, _COLUMNS = 16, 256  # of a program
_RANK = 64  # at higher ranks the units for matrix products are faster

Placement = tuple[Tensor, Tensor, Tensor, Tensor, float, float]
"""(out, base, left, right, alpha, beta)"""


@triton.jit
def _add_rows(table, ends, like, base_like, aligned: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    k, begin = find(ends, tl.load(table), program)
    row = table + (k + 1) * 9
    out = tl.load(row).to(tl.pointer_type(like.dtype.element_ty))
    base = tl.load(row + 1).to(tl.pointer_type(base_like.dtype.element_ty))
    left, right = tl.load(row + 2).to(tl.pointer_type(tl.float32)), tl.load(row + 3).to(tl.pointer_type(tl.float32))
    if aligned:
        out, base = tl.multiple_of(out, 16), tl.multiple_of(base, 16)
    m, n, rank = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    alpha, beta = as_float(tl.load(row + 7)), as_float(tl.load(row + 8))
    across = (n + columns - 1) // columns
    here = program - begin
    i = here // across * rows + tl.arange(0, rows)
    j = here % across * columns + tl.arange(0, columns)
    place = i[:, None] * n + j[None, :]
    inside = (i < m)[:, None] & (j < n)[None, :]
    value = tl.load(base + place, inside).to(tl.float32)
    kept = beta
    for q in range(0, rank // 2):
        a = tl.load(left + i * rank + 2 * q, i < m) * alpha
        b = tl.load(left + i * rank + 2 * q + 1, i < m) * alpha
        u = tl.load(right + j * rank + 2 * q, j < n)
        v = tl.load(right + j * rank + 2 * q + 1, j < n)
        value = kept * value + (a[:, None] * u[None, :] + b[:, None] * v[None, :])
        kept = tl.where(q >= 0, 1.0, kept)
    if rank % 2:
        a = tl.load(left + i * rank + rank - 1, i < m) * alpha
        u = tl.load(right + j * rank + rank - 1, j < n)
        value = kept * value + a[:, None] * u[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), inside)


def supports(out: Tensor, base: Tensor, right: Tensor) -> bool:
    """Whether the kernel supports these: contiguous, on a CUDA device, base float32, of a rank of at most 64."""
    narrow = out.dtype in (torch.float32, torch.bfloat16, torch.float16) and base.dtype == torch.float32
    return narrow and out.is_cuda and out.is_contiguous() and base.is_contiguous() and right.shape[1] <= _RANK


def place_products_(placements: Sequence[Placement]) -> None:
    """out = beta * base + alpha * left right^T, rounded once, for each.

    Shapes: out, base: (m, ...), read as a matrix of m rows; left: (m, r); right: (n, r).
    """
    alike = defaultdict(list)
    for out, base, left, right, alpha, beta in placements:
        factors = (factor.detach().to(torch.float32).contiguous() for factor in (left, right))
        if out.numel():
            alike[out.device, out.dtype].append((out, base, *factors, alpha, beta))
    for (device, _), group in alike.items():
        integers, programs = [], []
        for out, base, left, right, *_ in group:
            (m, rank), n = left.shape, right.shape[0]
            integers.append([*(tensor.data_ptr() for tensor in (out, base, left, right)), m, n, rank])
            programs.append(-(-m // _ROWS) * -(-n // _COLUMNS))
        aligned = not any(row[0] % 16 or row[1] % 16 or row[5] % 16 for row in integers)
        rows = table([len(group)], integers, [entry[4:] for entry in group], device)
        with torch.cuda.device_of(group[0][0]):
            _add_rows[(sum(programs),)](
                rows, ends(tuple(programs), device), group[0][0], group[0][1],
                aligned=aligned, rows=_ROWS, columns=_COLUMNS, enable_fp_fusion=False,
            )  # fmt: skip
