"""Philox noise on the CPU with numba: generated and added in one pass, nothing stored.

The same numbers as philox.py, bit for bit (tests/noise). About 1.5e9 normals a second and core where AVX-512 is there.
Tensors are cut into pieces for a small pool of threads; the kernels release the interpreter lock.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (pyright reads numba intrinsics as what they are before compilation)

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from metazo.noise import philox as definition

_PIECE = 1 << 18  # elements a task; a multiple of 128, so that no Philox block is split
_u32, _u64, _f32, _i32 = np.uint32, np.uint64, np.float32, np.int32

_M0, _M1 = _u64(definition._M0), _u64(definition._M1)
_W0, _W1 = _u32(definition._W0), _u32(definition._W1)
_P0, _P1, _P2, _P3, _P4, _P5, _P6, _P7, _P8 = (_f32(c) for c in definition.LOG_POLYNOMIAL)
_S0, _S1, _S2 = (_f32(c) for c in definition.SIN_POLYNOMIAL)
_C0, _C1, _C2 = (_f32(c) for c in definition.COS_POLYNOMIAL)
_LN2, _ANGLE, _HALF, _ONE = _f32(np.log(2.0)), _f32(definition.ANGLE), _f32(0.5), _f32(1.0)
_SQRT_HALF_BITS = _u32(definition.SQRT_HALF_BITS)


@intrinsic
def _as_float(typing_context, bits):
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@intrinsic
def _as_bits(typing_context, value):
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.IntType(32)
    )


@njit(inline="always")
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in range(10):
        p0, p1 = _M0 * _u64(c0), _M1 * _u64(c2)
        # numba widens uint32 ^ uint32; the outer cast brings it back
        c0, c1, c2, c3 = _u32(_u32(p1 >> _u64(32)) ^ c1 ^ k0), _u32(p1), _u32(_u32(p0 >> _u64(32)) ^ c3 ^ k1), _u32(p0)
        k0, k1 = _u32(k0 + _W0), _u32(k1 + _W1)
    return c0, c1, c2, c3


@njit(inline="always")
def _log(u):
    bits = _as_bits(u)
    exponent = _i32(bits - _SQRT_HALF_BITS) >> _i32(23)
    t = _as_float(_u32(bits - (_u32(exponent) << _u32(23)))) - _ONE
    p = ((((((((_P0 * t + _P1) * t + _P2) * t + _P3) * t + _P4) * t + _P5) * t + _P6) * t + _P7) * t) + _P8
    t2 = t * t
    return (p * t * t2 - _HALF * t2 + t) + _LN2 * _f32(exponent)


@njit(inline="always")
def _normal_pair(x, y):
    radius = np.sqrt(_f32(-2.0) * _log((_f32(_i32(x >> _u32(1))) + _HALF) * _f32(2.0**-31)))
    angle = _f32(_i32(y << _u32(2))) * _ANGLE
    a2 = angle * angle
    sine = ((_S0 * a2 + _S1) * a2 + _S2) * a2 * angle + angle
    cosine = ((_C0 * a2 + _C1) * a2 + _C2) * a2 * a2 - _HALF * a2 + _ONE
    swap = (y >> _u32(30)) & _u32(1)
    sign = (y >> _u32(31)) << _u32(31)
    first = _as_float(_as_bits(-sine if swap else cosine) ^ sign)
    second = _as_float(_as_bits(cosine if swap else sine) ^ sign)
    return radius * first, radius * second


@njit(nogil=True, cache=True, error_model="numpy")
def _gaussian(out, start, alpha, beta, plain, c1, c2, c3, k0, k1):
    """out = beta * out + alpha * z for elements start .. of a tensor, start a multiple of 4. plain: beta is 1."""
    full = out.size // 4
    first = start // 4
    if plain:
        for block in range(full):
            a, b, c, d = _philox(_u32(first + block), c1, c2, c3, k0, k1)
            z0, z1 = _normal_pair(a, b)
            z2, z3 = _normal_pair(c, d)
            e = 4 * block
            out[e] += alpha * z0
            out[e + 1] += alpha * z1
            out[e + 2] += alpha * z2
            out[e + 3] += alpha * z3
    else:
        for block in range(full):
            a, b, c, d = _philox(_u32(first + block), c1, c2, c3, k0, k1)
            z0, z1 = _normal_pair(a, b)
            z2, z3 = _normal_pair(c, d)
            e = 4 * block
            out[e] = beta * out[e] + alpha * z0
            out[e + 1] = beta * out[e + 1] + alpha * z1
            out[e + 2] = beta * out[e + 2] + alpha * z2
            out[e + 3] = beta * out[e + 3] + alpha * z3
    if out.size % 4:
        a, b, c, d = _philox(_u32(first + full), c1, c2, c3, k0, k1)
        z0, z1 = _normal_pair(a, b)
        z2, _ = _normal_pair(c, d)
        for i, z in enumerate((z0, z1, z2)):
            e = 4 * full + i
            if e < out.size:
                out[e] = beta * out[e] + alpha * z


@njit(inline="always")
def _add_signs(out, e, stop, word, alpha, beta):
    for i in range(stop - e):
        sign = ((word >> _u32(i)) & _u32(1)) << _u32(31)
        out[e + i] = beta * out[e + i] + alpha * _as_float(_as_bits(_ONE) ^ sign)


@njit(nogil=True, cache=True, error_model="numpy")
def _rademacher(out, start, alpha, beta, plain, c1, c2, c3, k0, k1):
    """As _gaussian; start a multiple of 128."""
    first = start // 128
    for block in range((out.size + 127) // 128):
        e = 128 * block
        words = _philox(_u32(first + block), c1, c2, c3, k0, k1)
        if e + 128 <= out.size:
            for i in range(4):
                _add_signs(out, e + 32 * i, e + 32 * i + 32, words[i], alpha, beta)
        else:
            for i in range(4):
                low = min(e + 32 * i, out.size)
                _add_signs(out, low, min(low + 32, out.size), words[i], alpha, beta)


_KERNELS = {"gaussian": _gaussian, "rademacher": _rademacher}


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="metazo-noise")


def supports(out: torch.Tensor) -> bool:
    """Whether add_ can work on this tensor: contiguous float32 or float64 in main memory."""
    return out.device.type == "cpu" and out.is_contiguous() and out.dtype in (torch.float32, torch.float64)


def add_(
    distribution: str, out: torch.Tensor, alpha: float, beta: float, seed: int, tensor_id: int, purpose: int
) -> None:
    """out = beta * out + alpha * z, in place, where supports(out)."""
    kernel = _KERNELS[distribution]
    flat = out.detach().view(-1).numpy()
    number = flat.dtype.type
    low = 0xFFFFFFFF
    fixed = (
        number(alpha), number(beta), beta == 1.0, _u32(purpose), _u32(tensor_id & low), _u32(tensor_id >> 32 & low),
        _u32(seed & low), _u32(seed >> 32 & low),
    )  # fmt: skip
    threads = torch.get_num_threads()
    if flat.size <= _PIECE or threads == 1:
        kernel(flat, 0, *fixed)
        return
    starts = range(0, flat.size, _PIECE)
    list(_pool(threads).map(lambda start: kernel(flat[start : start + _PIECE], start, *fixed), starts))
