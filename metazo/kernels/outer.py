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
    from metazo.kernels.parallel import JOB_ENTRIES, kernel, share
    from metazo.kernels.vectors import widest
except ImportError:  # numba is not installed; `metazo env` reports it
    kernel, share, JOB_ENTRIES = None, None, 0

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
    if share and compiled:
        share(_add_rows, (job for product in compiled for job in _jobs(*product)))


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
    if share and compiled:
        share(_add_rows, (job for first, second in compiled for job in _jobs(*first, second)))


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


def _jobs(
    out: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float, then: Product | None = None
) -> list[tuple]:
    rows = out.detach().numpy().reshape(len(left), -1)  # a view; numpy's calls take a third of the time of torch's
    columns, factors = _factors(out, left, right, alpha)
    scalars, rank = (rows.dtype.type(beta), rows.dtype.type(1)), len(columns)
    if then is not None:
        more, others = _factors(out, *then[1:4])
        columns, factors = np.concatenate([columns, more]), np.concatenate([factors, others], axis=1)
    step = max(JOB_ENTRIES // rows.shape[1], 1)
    return [
        (rows[start : start + step], factors[start : start + step], columns, rank, *scalars)
        for start in range(0, len(rows), step)
    ]


def _factors(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows of V^T, and alpha U, in the type of out."""
    u, v = (factor.detach().to(out.dtype).numpy() for factor in (left, right))
    return np.ascontiguousarray(v.T), u * u.dtype.type(alpha)


def _loop(out: Any, left: Any, columns: Any, cut: Any, beta: Any, one: Any) -> None:
    """out = beta * out + left columns, two terms of a sum at a time; the terms from `cut` on are summed separately."""
    widest()
    for first in range(0, out.shape[1], _COLUMNS):
        last = min(first + _COLUMNS, out.shape[1])
        for i in range(out.shape[0]):
            row, kept, k = out[i, first:last], beta, 0
            while k < left.shape[1]:
                a, u = left[i, k], columns[k, first:last]
                if k + 1 < left.shape[1] and k + 1 != cut:
                    b, v = left[i, k + 1], columns[k + 1, first:last]
                    for j in range(row.size):
                        row[j] = kept * row[j] + (a * u[j] + b * v[j])
                    k += 2
                else:
                    for j in range(row.size):
                        row[j] = kept * row[j] + a * u[j]
                    k += 1
                kept = one


_add_rows = kernel(_loop) if kernel else _loop
