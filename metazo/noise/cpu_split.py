"""Noise on weights that are split in two, on the CPU with numba: join, add noise, and split or round in one pass.

The result is bit-identical to `join` of metazo.kernels.splitfloat, cpu.add_ on the joined float32 weights, and `split`
(or rounding to nearest even).
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (pyright checks numba intrinsics as the Python functions that they are before compilation)

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from metazo.kernels import splitfloat
from metazo.kernels.compiled import kernel
from metazo.kernels.parallel import share
from metazo.kernels.pieces import pieces
from metazo.kernels.splitfloat import LAYOUTS, joined, parted
from metazo.kernels.vectors import widest
from metazo.noise import cpu, lanes, philox, wide, wide_weights
from metazo.noise.lanes import CHUNK, WORDS, fetch, narrow, numbers
from metazo.noise.wide_weights import whole, wide_add_split, wide_place_split

_u64 = np.uint64


def _kernel(function):
    return kernel(function, lanes, wide, wide_weights, philox, splitfloat)


@_kernel
def _place(out, high, low, start, alpha, below, dropped, scale, gaussian, purpose, id0, id1, k0, k1):
    """out = join(high, low) + alpha * z, on elements start .. of a tensor, start a multiple of TILE."""
    widest()
    z, words = np.empty(CHUNK, np.float32), np.empty(WORDS, np.uint32)
    for here in range(0, out.size, CHUNK):
        fetch(out, here)
        fetch(high, here)
        fetch(low, here)
        chunk = (start + here) // CHUNK
        counter = chunk, purpose, id0, id1, k0, k1
        if whole(out, here, gaussian) and wide_place_split(out, high, low, here, alpha, *counter):
            continue
        numbers(z, words, gaussian, chunk, purpose, id0, id1, k0, k1)
        for i in range(min(CHUNK, out.size - here)):
            e = _u64(here + i)
            out[e] = narrow(joined(high[e], low[e], below, dropped, scale) + alpha * z[i], out[e])


@_kernel
def _add(
    high, low, start, alpha, beta, below, dropped, scale, inverse, dither, gaussian, purpose, id0, id1, k0, k1
):  # fmt: skip
    """high, low = split(beta * join(high, low) + alpha * z), as _place."""
    widest()
    z, words = np.empty(CHUNK, np.float32), np.empty(WORDS, np.uint32)
    for here in range(0, high.size, CHUNK):
        fetch(high, here)
        fetch(low, here)
        chunk, first = (start + here) // CHUNK, np.int32(start + here)
        counter = chunk, purpose, id0, id1, k0, k1
        if whole(high, here, gaussian) and wide_add_split(high, low, here, first, alpha, beta, dither, *counter):
            continue
        numbers(z, words, gaussian, chunk, purpose, id0, id1, k0, k1)
        for i in range(min(CHUNK, high.size - here)):
            e = _u64(here + i)
            z[i] = beta * joined(high[e], low[e], below, dropped, scale) + alpha * z[i]
        for i in range(min(CHUNK, high.size - here)):
            e = _u64(here + i)
            high[e], low[e] = parted(z[i], first + np.int32(i), below, dropped, inverse, dither)


def supports(weights: Tensor, low: Tensor) -> bool:
    """Whether the kernels support these tensors: contiguous, in main memory, of a known narrow type."""
    return weights.dtype in LAYOUTS and cpu.supports(weights) and low.device.type == "cpu" and low.is_contiguous()


def place_(
    distribution: str,
    out: Tensor,
    weights: Tensor,
    low: Tensor,
    alpha: float,
    seed: int,
    tensor_id: int,
    purpose: int,
    start: int,
    spans: Sequence[tuple[int, int]] | None = None,
) -> None:
    """out = join(weights, low) + alpha * z[start : start + n], rounded once to nearest even, if supports(weights, low).

    Args: out, weights: (n,), bfloat16 or float16; low: (n,), int16 or int8; start: a multiple of TILE; spans: the entries
    of out to write, as (first, end), each first a multiple of TILE; by default all.
    """
    layout, cut = LAYOUTS[weights.dtype], pieces(len(weights))
    spans = [(here, here + cut.step) for here in cut] if spans is None else spans
    arrays = cpu._array(out), cpu._array(weights), low.numpy()
    bits = layout.below, splitfloat._dropped(layout, low), np.float32(layout.scale)
    fixed = (np.float32(alpha), *bits, distribution == "gaussian", *cpu._counter(seed, tensor_id, purpose))
    share(_place, [(*(array[first:end] for array in arrays), start + first, *fixed) for first, end in spans])


def add_(
    distribution: str,
    weights: Tensor,
    low: Tensor,
    alpha: float,
    beta: float,
    seed: int,
    tensor_id: int,
    purpose: int,
    start: int,
    rounding: int,
) -> None:
    """weights, low = split(beta * join(weights, low) + alpha * z[start : start + n]), if supports(weights, low).

    Args: as place_; rounding: the seed of `split`.
    """
    layout, cut = LAYOUTS[weights.dtype], pieces(len(weights))
    arrays = cpu._array(weights), low.numpy()
    bits = layout.below, splitfloat._dropped(layout, low), np.float32(layout.scale), np.float32(1 / layout.scale)
    scalars = np.float32(alpha), np.float32(beta), *bits, np.int32(splitfloat._folded(rounding))
    fixed = (*scalars, distribution == "gaussian", *cpu._counter(seed, tensor_id, purpose))
    share(_add, [(*(array[here : here + cut.step] for array in arrays), start + here, *fixed) for here in cut])
