"""Noise on weights that are split in two, on CUDA with triton: join, add noise, and split or round in one pass.

The twin of cpu_split.py, bit for bit; metazo/kernels/splitfloat.py says what is split, and how.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false
# (pyright checks triton kernels as the Python functions that they are before compilation)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from metazo.kernels import splitfloat
from metazo.kernels.splitfloat import LAYOUTS
from metazo.noise import cuda
from metazo.noise.cuda import normal_pair, normal_places, sign_places, sign_rows, words

_M0, _M1 = (tl.constexpr(m) for m in splitfloat.MULTIPLIERS)
_HALF_TOP = tl.constexpr(splitfloat.HALF_TOP)


@triton.jit
def _joined(high, low, below: tl.constexpr, dropped: tl.constexpr, scale):
    wide = high.to(tl.int32)
    wide = ((wide & 0x7FFF) << below) | (wide & -0x80000000)
    return (wide + (low.to(tl.int32) << dropped)).to(tl.float32, bitcast=True) * scale


@triton.jit
def _parted(theta, element, below: tl.constexpr, dropped: tl.constexpr, inverse, dither):
    bits = (theta * inverse).to(tl.int32, bitcast=True)
    if dropped:
        x = element.to(tl.int32) ^ dither
        x = (x ^ (x >> 16)) * tl.full((), _M0, tl.int32)
        x = (x ^ (x >> 16)) * tl.full((), _M1, tl.int32)
        x = (x ^ (x >> 15)) & ((1 << dropped) - 1)
        bits = (bits + x) & (-1 << dropped)
    magnitude = bits & 0x7FFFFFFF
    if below == 13:  # float16: infinity where the exponent has no room
        magnitude = tl.minimum(magnitude, _HALF_TOP)
    high = (magnitude + (1 << (below - 1))) >> below
    low = (magnitude - (high << below)) >> dropped
    return (high | ((bits >> 16) & -0x8000)).to(tl.int16), low


@triton.jit
def _entry(
    out, weights, low, place, size, first, z, alpha, beta, scale, inverse, dither,
    store: tl.constexpr, below: tl.constexpr, dropped: tl.constexpr,
):  # fmt: skip
    inside = place < size
    theta = beta * _joined(tl.load(weights + place, inside), tl.load(low + place, inside), below, dropped, scale)
    theta = theta + alpha * z
    if store:
        high, rest = _parted(theta, first + place, below, dropped, inverse, dither)
        tl.store(weights + place, high, inside)
        tl.store(low + place, rest.to(low.dtype.element_ty), inside)
    else:
        tl.store(out + place, theta.to(out.dtype.element_ty), inside)


@triton.jit(
    do_not_specialize=["first", "alpha", "beta", "scale", "inverse", "dither", "purpose", "id0", "id1", "k0", "k1"]
)
def _split(
    out, weights, low, size, first, alpha, beta, scale, inverse, dither, purpose, id0, id1, k0, k1,
    gaussian: tl.constexpr, store: tl.constexpr, below: tl.constexpr, dropped: tl.constexpr, blocks: tl.constexpr,
):  # fmt: skip
    """store: weights, low = split(beta * join(weights, low) + alpha * z); else out = beta * join(weights, low) + alpha * z.

    first: the first Philox block.
    """
    here = tl.program_id(0).to(tl.int64) * blocks + tl.arange(0, blocks)
    w0, w1, w2, w3 = words(here + first, purpose, id0, id1, k0, k1)
    element = first.to(tl.int64) * (8 if gaussian else 128)
    if gaussian:
        place = normal_places(here)
        for i in tl.static_range(4):
            word = w0 if i == 0 else w1 if i == 1 else w2 if i == 2 else w3
            z0, z1 = normal_pair(word)
            _entry(
                out, weights, low, place + 32 * i, size, element, z0, alpha, beta, scale, inverse, dither,
                store, below, dropped,
            )  # fmt: skip
            _entry(
                out, weights, low, place + 32 * i + 16, size, element, z1, alpha, beta, scale, inverse, dither,
                store, below, dropped,
            )  # fmt: skip
    else:
        place = sign_places(here)
        for i in tl.static_range(4):
            word = w0 if i == 0 else w1 if i == 1 else w2 if i == 2 else w3
            z = sign_rows(word, blocks)
            _entry(
                out, weights, low, place + 16 * i, size, element, z, alpha, beta, scale, inverse, dither,
                store, below, dropped,
            )  # fmt: skip


def supports(weights: Tensor, low: Tensor) -> bool:
    """Whether the kernels support these tensors: contiguous, on a CUDA device, of a known narrow type."""
    return weights.dtype in LAYOUTS and cuda.supports(weights) and low.is_cuda and low.is_contiguous()


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

    Args: as in cpu_split.py; spans: unused, because to write all is faster than to wait for the rows.
    """
    _launch(distribution, out, weights, low, alpha, 1.0, seed, tensor_id, purpose, start, None)


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
    _launch(distribution, weights, weights, low, alpha, beta, seed, tensor_id, purpose, start, rounding)


def _launch(distribution, out, weights, low, alpha, beta, seed, tensor_id, purpose, start, rounding):
    gaussian, blocks, entries = cuda.cut(distribution)
    layout, size = LAYOUTS[weights.dtype], weights.numel()
    integers = (cuda.int32(i) for i in (purpose, tensor_id, tensor_id >> 32, seed, seed >> 32))
    if not size:
        return
    with torch.cuda.device_of(weights):
        _split[(triton.cdiv(size, entries),)](
            out, weights.view(torch.int16), low, size, cuda.int32(start // (entries // blocks)), float(alpha), float(beta),
            layout.scale, 1 / layout.scale, cuda.int32(splitfloat._folded(rounding or 0)), *integers,
            gaussian=gaussian, store=rounding is not None, below=layout.below, dropped=splitfloat._dropped(layout, low),
            blocks=blocks, enable_fp_fusion=False,
        )  # fmt: skip
