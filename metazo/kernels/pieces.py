"""Pieces of many tensors for one call of a compiled loop, which finds each by its address.

A call for each tensor takes tens of microseconds of Python and numba, three times per step: for a small model longer than the
arithmetic. The tensors must not be freed or moved before the loop ends.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (pyright checks numba intrinsics as the Python functions that they are before compilation)

from __future__ import annotations

from collections.abc import Sequence

import torch
from numba import njit, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray

JOB_ENTRIES = 1 << 18  # entries of a job of a thread
ALIGN = 2048  # a piece begins at a multiple of this (noise.TILE), where noise can begin


@intrinsic
def _pointer(typing_context, address, like):
    """The address of an entry of `like`'s type."""
    pointer = types.CPointer(like.dtype)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, like), generate


@njit(inline="always")
def at(address, size, like):
    """The array of `size` entries of `like`'s type at an address, in a compiled loop."""
    return carray(_pointer(address, like), (size,))


@njit(inline="always")
def matrix(address, rows, columns, like):
    """As `at`, with two dimensions."""
    return carray(_pointer(address, like), (rows, columns))


def pieces(size: int) -> range:
    """Starts of the pieces of a tensor that threads take, equally many per thread; a small tensor is one piece."""
    threads = torch.get_num_threads()
    if size <= JOB_ENTRIES // 2 or threads == 1:
        return range(0, size, max(size, 1))
    count = threads * -(-size // (threads * JOB_ENTRIES))
    return range(0, size, -(-size // (count * ALIGN)) * ALIGN)


def groups(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Pieces of these sizes that are taken in one call, as (first, end): several per thread, unless they are very small."""
    threads = torch.get_num_threads()
    enough = JOB_ENTRIES if threads == 1 else min(max(sum(sizes) // (4 * threads), JOB_ENTRIES // 8), JOB_ENTRIES)
    found, first, entries = [], 0, 0
    for k, size in enumerate(sizes):
        entries += size
        if entries >= enough:
            found.append((first, k + 1))
            first, entries = k + 1, 0
    return found + [(first, len(sizes))] * (first < len(sizes))
