"""Tables of tensors for triton kernels: one launch for all tensors of a pass.

A launch takes about 30 us of the processor, as long as a GPU takes for some million weights. A table has a row of int64 per
tensor, and each program finds its row by bisection.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# (pyright checks triton kernels as the Python functions that they are before compilation)

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def find(ends, count, program):
    """(row, first program of the row): the row whose programs include this one. ends: the first program after each row."""
    low, high = program * 0, count - 1
    while low < high:
        middle = (low + high) // 2
        after = tl.load(ends + middle) <= program
        low = tl.where(after, middle + 1, low)
        high = tl.where(after, high, middle)
    return low, tl.load(ends + low - 1, low > 0, other=0)


@triton.jit
def as_float(number):
    """The float32 whose bits are the low half of an int64."""
    return number.to(tl.int32).to(tl.float32, bitcast=True)


def int64(value: int) -> int:
    """The low 64 bits as a signed number."""
    return (value & 0xFFFFFFFFFFFFFFFF ^ 1 << 63) - (1 << 63)


def table(head: Sequence[int], integers: Sequence[Sequence[int]], floats: Sequence[Sequence[float]], device) -> Tensor:
    """Rows of integers followed by floats (as_float), after one row that begins with head. Does not wait for the device."""
    rows = np.concatenate([np.array(integers, np.int64), np.array(floats, np.float32).view(np.int32)], axis=1)
    first = np.zeros((1, rows.shape[1]), np.int64)
    first[0, : len(head)] = head
    return on_device(np.concatenate([first, rows]), device)


@lru_cache(maxsize=64)
def ends(programs: tuple[int, ...], device: torch.device) -> Tensor:
    """The first program after each row, of the numbers of programs of each row."""
    return on_device(np.cumsum(programs), device)


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device. Does not wait for the device."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
