"""Philox and its mappings as loops that numba compiles: a chunk of noise at a time, for the loops over weights in cpu.py.

The numbers are those of philox.py, bit for bit (tests/noise). Every loop is written for LLVM's vectoriser. 32 Philox blocks
are computed side by side in 64-bit lanes, of which only the low halves count, so that a product needs no shuffles and
independent chains of ten rounds hide each other's latency. Their 256 numbers go to a buffer in the first-level cache. Normals
of a processor with registers of 256 or 512 bits are made by wide.py.

What is called for each number is inlined by numba, because LLVM would not vectorise the call. What is called for each chunk is
inlined by LLVM (`forceinline`): it is compiled once in a process, not again in every loop that uses it, and has the vectors
that it asks for itself.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (pyright checks numba intrinsics as the Python functions that they are before compilation)

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from metazo.kernels.casts import as_bits, as_float, from_half, to_half
from metazo.kernels.vectors import prefetch, widest
from metazo.noise import philox as definition
from metazo.noise.wide import WIDE, wide_normals

CHUNK = 256  # numbers in the buffer
WORDS = 128  # 32-bit words of 32 blocks
_AHEAD = 1024  # elements between the one calculated and the one prefetched
_u16, _u32, _u64, _f32, _i32 = np.uint16, np.uint32, np.uint64, np.float32, np.int32

_M0, _M1, _LOW, _HALF = _u64(definition._M0), _u64(definition._M1), _u64(definition._LOW), _u64(32)
_W0, _W1 = _u64(definition._W0), _u64(definition._W1)
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5 = (_f32(c) for c in definition.Q)
_C0, _C1, _C2, _C3 = (_f32(c) for c in definition.C)
_S0, _S1, _S2 = (_f32(c) for c in definition.S)
_UNIT, _ANGLE, _TWO = _f32(definition.UNIT), _f32(definition.ANGLE), _f32(2.0)
_STRIDE, _TOP_BITS = _u32(definition.STRIDE), _u32(definition.TOP_BITS)
_VALUE, _MANTISSA, _ONE, _SIGN = _u32(0x3FFFFFFE), _u32(0x7FFFFF), _u32(0x3F800000), _u32(0x80000000)


def widen(x):
    """A stored number as a float: bfloat16 is passed as uint16, float16 as int16."""


def narrow(x, like):
    """A float as a stored number, rounded to nearest even."""


@overload(widen)
def _widen_typed(x):
    if x == types.uint16:
        return lambda x: as_float(_u32(x) << _u32(16))
    if x == types.int16:
        return lambda x: from_half(x)
    return lambda x: x


@overload(narrow)
def _narrow_typed(x, like):
    def bfloat16(x, like):
        bits = as_bits(x)
        rounded = (bits + _u32(0x7FFF) + ((bits >> _u32(16)) & _u32(1))) >> _u32(16)
        return _u16(rounded if x == x else _u32(0x7FC0))

    if like == types.uint16:
        return bfloat16
    if like == types.int16:
        return lambda x, like: to_half(x)
    return lambda x, like: x


@njit(inline="always")
def _philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds in 64-bit lanes, of which only the low halves count."""
    for _ in range(10):
        p0, p1 = _M0 * (c0 & _LOW), _M1 * (c2 & _LOW)
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1, (p0 >> _HALF) ^ c3 ^ k1, p0
        k0, k1 = k0 + _W0, k1 + _W1
    return _u32(c0), _u32(c1), _u32(c2), _u32(c3)


@njit(inline="always")
def _normal_pair(word):
    v = (word & _VALUE) | _u32(1)
    bits = as_bits(_f32(_i32(v)))
    y = _TWO - as_float((bits & _MANTISSA) | _ONE)
    q = ((((_Q0 * y + _Q1) * y + _Q2) * y + _Q3) * y + _Q4) * y + _Q5
    radius = np.sqrt(_f32(_i32(_TOP_BITS - bits)) * _UNIT - y * q)
    a = _f32(_i32(v * _STRIDE)) * _ANGLE
    a2 = a * a
    c = ((_C0 * a2 + _C1) * a2 + _C2) * a2 + _C3
    s = ((_S0 * a2 + _S1) * a2 + _S2) * a
    first, second = radius * (c - s), radius * (c + s)
    return as_float(as_bits(first) ^ (word & _SIGN)), as_float(as_bits(second) ^ ((word << _u32(1)) & _SIGN))


@njit(forceinline=True)
def normals(z, words, chunk, c1, c2, c3, k0, k1):
    """The 256 normals of 32 blocks. Block 16 i + lane has the numbers at 128 i + lane, 16 apart."""
    widest()
    if WIDE:
        wide_normals(z, _u64(chunk), c1, c2, c3, k0, k1)
        return
    for block in range(32):
        w0, w1, w2, w3 = _philox(_u64(32 * chunk + block), c1, c2, c3, k0, k1)
        words[block], words[block + 32], words[block + 64], words[block + 96] = w0, w1, w2, w3
    for half in range(2):
        for word in range(4):
            for lane in range(16):
                place = _u64(128 * half + 32 * word + lane)
                z[place], z[place + _u64(16)] = _normal_pair(words[_u64(32 * word + 16 * half + lane)])


@njit(forceinline=True)
def signs(z, words, fresh, chunk, c1, c2, c3, k0, k1):
    """The next 256 signs: four bits of each of the 64 words that the eight chunks of a tile share; fresh: make these first."""
    widest()
    if fresh:
        for lane in range(16):
            w0, w1, w2, w3 = _philox(_u64(2 * (chunk - chunk % 8) + lane), c1, c2, c3, k0, k1)
            words[lane], words[lane + 16], words[lane + 32], words[lane + 48] = w0, w1, w2, w3
    for i in range(4):
        shift = _u32(4 * (chunk % 8) + i)
        for lane in range(64):
            z[64 * i + lane] = as_float(((words[lane] << shift) & _SIGN) | _ONE)


@njit(forceinline=True)
def numbers(z, words, gaussian, chunk, purpose, id0, id1, k0, k1):
    """Write numbers 256 chunk .. of a tensor into z. A tile's chunks of signs must be requested in order, with one `words`."""
    numbers_from(z, words, chunk % 8 == 0, gaussian, chunk, purpose, id0, id1, k0, k1)


@njit(forceinline=True)
def numbers_from(z, words, fresh, gaussian, chunk, purpose, id0, id1, k0, k1):
    """As `numbers`, from any chunk of a tile, which must be given as fresh, as must the first chunk of the tiles after it."""
    c1, c2, c3, k0, k1 = _u64(purpose), _u64(id0), _u64(id1), _u64(k0), _u64(k1)
    if gaussian:
        normals(z, words, chunk, c1, c2, c3, k0, k1)
    else:
        signs(z, words, fresh, chunk, c1, c2, c3, k0, k1)


@njit(forceinline=True)
def fetch(array, here):
    """Prefetch a chunk of the array, some chunks after the one that begins here.

    The processor's own prefetcher is not enough: it stops at every page, and a chunk of noise has more instructions than
    the window in which the processor sees the next loads.
    """
    for i in range(0, CHUNK, 64 // array.itemsize):
        prefetch(array, here + _AHEAD + i)
