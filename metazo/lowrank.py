"""out = beta out + alpha U V^T on a matrix, in place: what a step along a low-rank direction does to the weights.

addmm does it too, but sums over a rank of 2 with machinery made for hundreds: at a third of the speed of memory, for three
passes a step. The compiled form (numba, on the CPU) reads and writes each weight once at that speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from metazo.threads import kernel, share
except ImportError:  # numba is not there; metazo env says so
    kernel = share = None

_PIECE = 1 << 18  # entries that a thread takes at once
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
    jobs: list[tuple] = []
    for out, left, right, alpha, beta in products:
        left, right = left.to(out.dtype), right.to(out.dtype)
        if kernel and out.device.type == "cpu" and out.dtype in _COMPILED and out.is_contiguous() and out.numel():
            jobs += _jobs(out, left, right, alpha, beta)
        else:
            plain_(out, left, right, alpha, beta)
    if share and jobs:
        share(_add_rows, jobs)


def plain_(out: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float) -> None:
    """The same with torch alone."""
    rows = out.flatten(1)
    rows.addmm_(left, right.t(), beta=beta, alpha=alpha)
    if rows.data_ptr() != out.data_ptr():  # not contiguous: the rows are a copy
        out.copy_(rows.view(out.shape))


def _jobs(out: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float) -> list[tuple]:
    rows, columns = out.detach().view(len(left), -1).numpy(), right.detach().t().contiguous().numpy()
    factors, step = (left.detach() * alpha).numpy(), max(_PIECE // rows.shape[1], 1)
    scalars = rows.dtype.type(beta), rows.dtype.type(1)
    return [
        (rows[start : start + step], factors[start : start + step], columns, *scalars)
        for start in range(0, len(rows), step)
    ]


def _loop(out: Any, left: Any, columns: Any, beta: Any, one: Any) -> None:
    """out = beta * out + left columns, two terms of the sum at a time."""
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
