"""Narrow weights and the bits below them, as one float32: theta = join(weights, low), and back.

A bfloat16 is the upper 16 bits of a float32; a float16, after a shift of its exponent, the upper 19. The 16 or 13 bits below
are stored as the signed remainder of rounding to nearest: all of them in an int16, or the upper 8 in an int8.

`join` and `split` are compiled (numba, on the CPU); `plain_join` and `plain_split` do the same with torch alone, bit for
bit, on all other devices.
"""

# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false
# (pyright checks numba intrinsics as the Python functions that they are before compilation)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from numba import njit

    from metazo.kernels.casts import as_bits, as_float, shift_left, shift_right
    from metazo.kernels.compiled import kernel
    from metazo.kernels.parallel import share
    from metazo.kernels.pieces import JOB_ENTRIES
    from metazo.kernels.vectors import widest
except ImportError:  # numba is not installed; `metazo env` reports it
    kernel, share, JOB_ENTRIES = None, None, 0


@dataclass(frozen=True)
class Layout:
    """A narrow type as the upper bits of a float32: the bits below it, and 2^(difference of exponent biases)."""

    below: int
    scale: float


LAYOUTS = {torch.bfloat16: Layout(16, 1.0), torch.float16: Layout(13, 2.0**112)}
HALF_TOP = (127 - 96) << 23
"""Infinity of float16 as the bits of such a float32, 2^16 / scale. Larger numbers become it; their exponent has no room."""
_SIGN, _MAGNITUDE = -(1 << 31), (1 << 31) - 1
MULTIPLIERS = (0x7FEB352D, -0x7B935975)  # Wellons' lowbias32, with arithmetic shifts


def join(weights: Tensor, low: Tensor, room: Tensor | None = None) -> Tensor:
    """Theta, float32, of narrow weights and the signed bits below them (int16, or int8: the upper ones of those).

    float16 below 2^-14 passes through numbers below 2^-126: a thread that `flushes` would make it 0, here and in `split`.
    Shapes: all (n,). room: float32 memory to use, of at least n entries: allocating memory for every chunk costs as much
    time as filling it.
    """
    if not _compiled(weights, low):
        return plain_join(weights, low)
    layout = LAYOUTS[weights.dtype]
    theta = torch.empty(len(weights), dtype=torch.float32, device="cpu") if room is None else room[: len(weights)]
    arrays = weights.view(torch.int16).numpy(), low.numpy(), theta.numpy()
    fixed = (layout.below, _dropped(layout, low), np.float32(layout.scale))
    share(_join, [(*cut, *fixed) for _, cut in _cuts(*arrays)])  # type: ignore[misc]
    return theta


def split(theta: Tensor, weights: Tensor, low: Tensor, start: int, seed: int) -> None:
    """The inverse of `join`: weights = theta rounded (half away from zero), low = the bits in which they differ.

    With 16 bits this is exact, except for float16 below 2^-14, for which theta is a multiple of 2^-37. With 8 bits theta is
    first rounded stochastically, so that changes smaller than their unit (2^-8 of the weights') survive on average; the
    dither is a hash of seed and element, the same on every device. float16 above 65536 becomes infinite. theta may be
    overwritten.
    """
    if not (_compiled(weights, low) and theta.is_contiguous() and theta.dtype == torch.float32):
        plain_split(theta, weights, low, start, seed)
        return
    layout, arrays = LAYOUTS[weights.dtype], (theta.numpy(), weights.view(torch.int16).numpy(), low.numpy())
    fixed = (layout.below, _dropped(layout, low), np.float32(1 / layout.scale), np.int32(_folded(seed)))
    share(_split, [(*cut, start + first, *fixed) for first, cut in _cuts(*arrays)])  # type: ignore[misc]


def with_bits(low: Tensor, weights: torch.dtype, dtype: torch.dtype) -> Tensor:
    """The bits below weights of a narrow type as int16 or int8 (`dtype`), whichever of the two they are: theta stays as it
    is, or is rounded to nearest if an int8 has fewer of them.
    """
    if low.dtype == dtype:
        return low
    dropped = LAYOUTS[weights].below - 8
    if dtype == torch.int16:
        return low.to(dtype) << dropped
    return (low.to(torch.int32) + (1 << (dropped - 1)) >> dropped).clamp(max=127).to(dtype)


def flushes() -> bool:
    """Whether this thread takes float32 numbers below 2^-126 for 0, as after torch.set_flush_denormal(True)."""
    return float(torch.tensor(1e-40, dtype=torch.float32, device="cpu") * 1) == 0


def _compiled(weights: Tensor, low: Tensor) -> bool:
    return kernel is not None and weights.device.type == "cpu" and weights.is_contiguous() and low.is_contiguous()


def _dropped(layout: Layout, low: Tensor) -> int:
    """Number of bits of theta that are not kept."""
    return layout.below - 8 if low.dtype == torch.int8 else 0


def _folded(seed: int) -> int:
    return (seed ^ seed >> 32) & 0x7FFFFFFF


def _cuts(*arrays: np.ndarray) -> list[tuple[int, tuple[np.ndarray, ...]]]:
    starts = range(0, len(arrays[0]), JOB_ENTRIES)
    return [(start, tuple(array[start : start + JOB_ENTRIES] for array in arrays)) for start in starts]


def plain_join(weights: Tensor, low: Tensor) -> Tensor:
    """`join` with torch alone."""
    layout = LAYOUTS[weights.dtype]
    wide = weights.view(torch.int16).to(torch.int32)
    wide = ((wide & 0x7FFF) << layout.below).bitwise_or_(wide & _SIGN) if layout.below < 16 else wide << 16
    wide += low.to(torch.int32) << _dropped(layout, low)
    return wide.view(torch.float32).mul_(layout.scale)


def plain_split(theta: Tensor, weights: Tensor, low: Tensor, start: int, seed: int) -> None:
    """`split` with torch alone. theta is overwritten."""
    layout = LAYOUTS[weights.dtype]
    bits = theta.mul_(1 / layout.scale).view(torch.int32)
    dropped = _dropped(layout, low)
    if dropped:
        bits += dither(start, bits.numel(), seed, dropped, bits.device)
        bits &= -1 << dropped
    magnitude = bits & _MAGNITUDE
    if layout.below == 13:
        magnitude.clamp_(max=HALF_TOP)
    high = (magnitude + (1 << (layout.below - 1))).bitwise_right_shift_(layout.below)
    low.copy_(magnitude.sub_(high << layout.below).bitwise_right_shift_(dropped))
    weights.view(torch.int16).copy_(high.bitwise_or_(bits.bitwise_right_shift_(16).bitwise_and_(-(1 << 15))))


def dither(start: int, count: int, seed: int, bits: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform integers of that many bits for elements start .. start + count - 1. Returns: (count,), int32."""
    x = torch.arange(start, start + count, dtype=torch.int64, device=device).to(torch.int32)
    x ^= _folded(seed)
    for multiplier in MULTIPLIERS:
        x ^= x >> 16
        x *= multiplier
    return (x ^ x >> 15).bitwise_and_((1 << bits) - 1)


_i16, _i32, _u32, _u64 = np.int16, np.int32, np.uint32, np.uint64
_M0, _M1 = (_i32(m) for m in MULTIPLIERS)
_HALF_TOP = _i32(HALF_TOP)
_FIFTEEN, _SIXTEEN, _LOW, _TOP, _REST = _i32(15), _i32(16), _i32(0x7FFF), _i32(_SIGN), _i32(_MAGNITUDE)


def _joined(high: Any, low: Any, below: int, dropped: int, scale: Any) -> Any:
    wide = _i32(_i16(high))
    wide = _i32(shift_left(_i32(wide & _LOW), _i32(below)) | _i32(wide & _TOP))
    return as_float(_u32(wide + shift_left(_i32(low), _i32(dropped)))) * scale


def _parted(theta: Any, element: Any, below: int, dropped: int, scale: Any, seed: Any) -> Any:
    bits, up, down, one = _i32(as_bits(theta * scale)), _i32(below), _i32(dropped), _i32(1)
    if dropped:
        x = _i32(_i32(element) ^ seed)
        x = _i32(_i32(x ^ shift_right(x, _SIXTEEN)) * _M0)
        x = _i32(_i32(x ^ shift_right(x, _SIXTEEN)) * _M1)
        x = _i32(_i32(x ^ shift_right(x, _FIFTEEN)) & _i32(shift_left(one, down) - one))
        bits = _i32(_i32(bits + x) & shift_left(_i32(-1), down))
    magnitude = min(_i32(bits & _REST), _HALF_TOP if below == 13 else _REST)
    high = shift_right(_i32(magnitude + shift_left(one, _i32(up - one))), up)
    low = shift_right(_i32(magnitude - shift_left(high, up)), down)
    return _i16(high | _i32(shift_right(bits, _SIXTEEN) & _i32(-0x8000))), low


def _join_loop(weights: Any, low: Any, theta: Any, below: int, dropped: int, scale: Any) -> None:
    widest()
    for i in range(theta.size):
        e = _u64(i)  # unsigned, because numba checks a signed index for being negative
        theta[e] = joined(weights[e], low[e], below, dropped, scale)


def _split_loop(
    theta: Any, weights: Any, low: Any, start: int, below: int, dropped: int, scale: Any, seed: Any
) -> None:
    widest()
    first = _i32(start)
    for i in range(theta.size):
        e = _u64(i)
        weights[e], low[e] = parted(theta[e], first + _i32(i), below, dropped, scale, seed)


if kernel:
    joined, parted = (njit(inline="always")(function) for function in (_joined, _parted))  # of one weight
    _join, _split = kernel(_join_loop), kernel(_split_loop)
