"""Add a product of two thin factors to a matrix: out = beta * out + alpha * left right^T.

torch's addmm does the same, but at rank 2 it reaches a third of the speed of memory, because it is made for ranks in the
hundreds. The compiled loop (numba, on the CPU) reads and writes each weight once at the speed of memory, and outer_cuda.py
does the same on a GPU; `plain_` is the same in torch, for other devices and types.
"""

# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false
# (pyright checks numba intrinsics as the Python functions that they are before compilation)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from metazo.kernels.compiled import kernel
    from metazo.kernels.parallel import share
    from metazo.kernels.pieces import JOB_ENTRIES, groups, matrix
    from metazo.kernels.vectors import widest
except ImportError:  # numba is not installed; `metazo env` reports it
    kernel = None

try:
    from metazo.kernels import outer_cuda
except ImportError:  # triton is not installed; `metazo env` reports it
    outer_cuda = None

_COLUMNS = 1024  # entries of a row that fit the first-level cache together with those of V
_COMPILED = (torch.float32, torch.float64)

Product = tuple[Tensor, Tensor, Tensor, float, float]
"""(out, left, right, alpha, beta): the arguments of add_product_."""


def add_product_(out: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float) -> None:
    """out = beta * out + alpha * left right^T, in place.

    Args: out: (m, ...), read as a matrix of m rows if it has more than two dimensions; left: (m, r); right: (n, r), n the
        entries of a row.
    """
    add_products_([(out, left, right, alpha, beta)])


def add_products_(products: Sequence[Product]) -> None:
    """add_product_ for each; those that the compiled loop supports share one call of it."""
    compiled, on_cuda = [], []
    for product in products:
        out, left, right, alpha, beta = product
        if kernel and _fits(out):
            compiled.append(product)
        elif _fits_cuda(out, out, right):
            on_cuda.append((out, out, left, right, alpha, beta))
        else:
            plain_(*product)
    if outer_cuda and on_cuda:
        outer_cuda.place_products_(on_cuda)
    if compiled:
        _add(compiled)


def add_product_pairs_(firsts: Sequence[Product], seconds: Sequence[Product]) -> None:
    """Add two products to each matrix, in one compiled pass if possible, which removes a probe and applies the next.

    The result is bit-identical to add_products_(firsts), then add_products_(seconds). Both of a pair have the same `out`, and
    the second has beta 1; otherwise raises ValueError.
    """
    if any(second[4] != 1.0 or first[0] is not second[0] for first, second in zip(firsts, seconds, strict=True)):
        raise ValueError("a pair of products is added to one matrix, the second with `beta` 1")
    pairs = list(zip(firsts, seconds))
    compiled = [pair for pair in pairs if kernel and _fits(pair[0][0])]
    rest = [pair for pair in pairs if not (kernel and _fits(pair[0][0]))]
    for products in zip(*rest):
        add_products_(products)
    if compiled:
        _add([first for first, _ in compiled], [second for _, second in compiled])


def place_products_(placements: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, float]]) -> list[bool]:
    """out = base + alpha * left right^T, rounded once, for each (out, base, left, right, alpha) with a kernel for it.

    Returns: for each, whether there was one; if not, nothing was done.
    """
    fit = [_fits_cuda(out, base, right) for out, base, _, right, _ in placements]
    if outer_cuda and any(fit):
        outer_cuda.place_products_([(*place, 1.0) for place, fits in zip(placements, fit) if fits])
    return fit


def _fits_cuda(out: Tensor, base: Tensor, right: Tensor) -> bool:
    return outer_cuda is not None and outer_cuda.supports(out, base, right)


def _fits(out: Tensor) -> bool:
    return out.device.type == "cpu" and out.dtype in _COMPILED and out.is_contiguous() and out.numel() > 0


def plain_(out: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float) -> None:
    """add_product_ with torch alone."""
    rows = out.flatten(1)
    rows.addmm_(left.to(out.dtype), right.to(out.dtype).t(), beta=beta, alpha=alpha)
    if rows.data_ptr() != out.data_ptr():  # not contiguous: the rows are a copy
        out.copy_(rows.view(out.shape))


def _add(products: Sequence[Product], then: Sequence[Product] = ()) -> None:
    """add_products_ by the compiled loop; a call of it takes rows of several matrices. then: the second product of each."""
    kinds: dict[torch.dtype, tuple[list[tuple], list[tuple]]] = {}
    alive = []  # factors, until this function ends, because the loop knows addresses alone
    for product, second in zip(products, then or [None] * len(products)):
        out, left, right, alpha, beta = product
        rows, amounts = kinds.setdefault(out.dtype, ([], []))
        factors = [_factor(factor, out.dtype) for factor in (left, right, *(second[1:3] if second else ()))]
        alive += factors
        left, right, *more = factors
        other, columns, further = (*more, more[0].shape[1]) if second else (left, right, 0)
        width, (height, rank), length = out.element_size(), left.shape, len(right)
        if out.numel() != height * length or right.shape[1] != rank or columns.shape[1] != (further or rank):
            raise ValueError("the factors of a product do not fit its matrix")
        if (len(other), len(columns)) != (height, length):
            raise ValueError("the factors of a second product do not fit its matrix")
        step = max(JOB_ENTRIES // length, 32)
        for start in range(0, height, step):
            count, there = min(step, height - start), width * start
            first = left.data_ptr() + there * rank, right.data_ptr(), rank
            last = other.data_ptr() + there * further, columns.data_ptr(), further
            rows.append((out.data_ptr() + there * length, count, length, *first, *last))
            amounts.append((alpha, beta, second[3] if second else 0.0))
    jobs = []
    for dtype, (rows, amounts) in kinds.items():
        like = torch.empty(0, dtype=dtype, device="cpu").numpy()
        fixed = np.array(rows, np.int64), np.array(amounts, like.dtype), like, like.dtype.type(1)
        jobs += [(*fixed, first, last) for first, last in groups([row[1] * row[2] for row in rows])]
    share(_add_rows, jobs)


def _factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return factor if factor.dtype == dtype and factor.is_contiguous() else factor.to(dtype).contiguous()


def _loop(rows: Any, amounts: Any, like: Any, one: Any, begin: Any, end: Any) -> None:
    """out = beta * out + alpha * left right^T + again * other columns^T for rows begin .. end of the tables that _add makes,
    two terms of a sum at a time; the two products are summed separately.
    """
    widest()
    for piece in range(begin, end):
        height, length, rank, further = rows[piece, 1], rows[piece, 2], rows[piece, 5], rows[piece, 8]
        out = matrix(rows[piece, 0], height, length, like)
        left, right = matrix(rows[piece, 3], height, rank, like), matrix(rows[piece, 4], length, rank, like)
        other, columns = matrix(rows[piece, 6], height, further, like), matrix(rows[piece, 7], length, further, like)
        alpha, beta, again = amounts[piece, 0], amounts[piece, 1], amounts[piece, 2]
        # V^T and alpha U for the entries at hand
        across = np.empty((rank + further, min(length, _COLUMNS)), like.dtype)
        along = np.empty(rank + further, like.dtype)
        for first in range(0, length, _COLUMNS):
            count = min(_COLUMNS, length - first)
            for j in range(count):
                for k in range(rank):
                    across[k, j] = right[first + j, k]
                for k in range(further):
                    across[rank + k, j] = columns[first + j, k]
            for i in range(height):
                for k in range(rank):
                    along[k] = left[i, k] * alpha
                for k in range(further):
                    along[rank + k] = other[i, k] * again
                row, kept, k = out[i, first : first + count], beta, 0
                while k < along.size:
                    a, u = along[k], across[k, :count]
                    if k + 1 < along.size and k + 1 != rank:
                        b, v = along[k + 1], across[k + 1, :count]
                        for j in range(row.size):
                            row[j] = kept * row[j] + (a * u[j] + b * v[j])
                        k += 2
                    else:
                        for j in range(row.size):
                            row[j] = kept * row[j] + a * u[j]
                        k += 1
                    kept = one


_add_rows = kernel(_loop) if kernel else _loop
