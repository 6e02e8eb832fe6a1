"""Add a product of two thin factors to a matrix: out = beta * out + alpha * left right^T.

torch's addmm does the same, but it sums over a rank of 2 with machinery made for hundreds: at a third of the speed of
memory. The compiled loop (numba, on the CPU) reads and writes each weight once at that speed; `plain_` is its slow twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from metazo.kernels.parallel import PIECE, kernel, share
    from metazo.kernels.vectors import widest
except ImportError:  # numba is not there; metazo env says so
    kernel, share, PIECE = None, None, 0

_COLUMNS = 1024  # entries of a row, and of V beside it, that stay in the first-level cache
_COMPILED = (torch.float32, torch.float64)

Product = tuple[Tensor, Tensor, Tensor, float, float]
"""(out, left, right, alpha, beta): the arguments of add_product_."""


def add_product_(out: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float) -> None:
    """out = beta * out + alpha * left right^T, in place.

    Args: out: (m, ...), a matrix of its rows where it has more dimensions than two; left: (m, r); right: (n, r), n the
        entries of a row.
    """
    add_products_([(out, left, right, alpha, beta)])


def add_products_(products: Sequence[Product]) -> None:
    """add_product_ for each, those that are compiled in one go."""
    compiled = [product for product in products if kernel and _fits(product[0])]
    for product in products:
        if not (kernel and _fits(product[0])):
            plain_(*product)
    if share and compiled:
        share(_add_rows, (job for product in compiled for job in _jobs(*product)))


def _fits(out: Tensor) -> bool:
    return out.device.type == "cpu" and out.dtype in _COMPILED and out.is_contiguous() and out.numel() > 0


def plain_(out: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float) -> None:
    """The same with torch alone."""
    rows = out.flatten(1)
    rows.addmm_(left.to(out.dtype), right.to(out.dtype).t(), beta=beta, alpha=alpha)
    if rows.data_ptr() != out.data_ptr():  # not contiguous: the rows are a copy
        out.copy_(rows.view(out.shape))


def _jobs(out: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float) -> list[tuple]:
    rows = out.detach().numpy().reshape(len(left), -1)  # a view; numpy's calls cost a third of torch's
    left, right = left.detach().to(out.dtype), right.detach().to(out.dtype)
    columns, factors = np.ascontiguousarray(right.numpy().T), left.numpy() * rows.dtype.type(alpha)
    scalars, step = (rows.dtype.type(beta), rows.dtype.type(1)), max(PIECE // rows.shape[1], 1)
    return [
        (rows[start : start + step], factors[start : start + step], columns, *scalars)
        for start in range(0, len(rows), step)
    ]


def _loop(out: Any, left: Any, columns: Any, beta: Any, one: Any) -> None:
    """out = beta * out + left columns, two terms of the sum at a time."""
    widest()
    rank = left.shape[1]
    for first in range(0, out.shape[1], _COLUMNS):
        last = min(first + _COLUMNS, out.shape[1])
        for i in range(out.shape[0]):
            row, kept = out[i, first:last], beta
            for k in range(0, rank - 1, 2):
                a, b, u, v = left[i, k], left[i, k + 1], columns[k, first:last], columns[k + 1, first:last]
                for j in range(row.size):
                    row[j] = kept * row[j] + (a * u[j] + b * v[j])
                kept = one
            if rank % 2:
                a, u = left[i, rank - 1], columns[rank - 1, first:last]
                for j in range(row.size):
                    row[j] = kept * row[j] + a * u[j]


_add_rows = kernel(_loop) if kernel else _loop
