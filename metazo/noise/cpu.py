"""Philox noise on the CPU with numba: generated and added in one pass, nothing stored.

The same numbers as philox.py, bit for bit (tests/noise). The loops are written for LLVM's vectoriser: sixteen Philox
blocks side by side in 64-bit lanes (the low halves count, so that a product needs no shuffles), 128 numbers into a buffer
that stays in the first-level cache, and from there onto the weights.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (pyright reads numba intrinsics as what they are before compilation)

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from llvmlite import binding
from numba import njit, types
from numba.extending import overload

from metazo.kernels.casts import as_bits, as_float, from_half, to_half
from metazo.kernels.parallel import PIECE, kernel, share
from metazo.noise import philox as definition

_CHUNK = 128  # numbers in the buffer
_u16, _u32, _u64, _f32, _i32 = np.uint16, np.uint32, np.uint64, np.float32, np.int32

_CONSTANTS = (definition.Q, definition.C, definition.S, definition.UNIT, definition.ANGLE, definition.STRIDE)
_M0, _M1, _LOW, _HALF = _u64(definition._M0), _u64(definition._M1), _u64(definition._LOW), _u64(32)
_W0, _W1 = _u64(definition._W0), _u64(definition._W1)
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5 = (_f32(c) for c in definition.Q)
_C0, _C1, _C2, _C3 = (_f32(c) for c in definition.C)
_S0, _S1, _S2 = (_f32(c) for c in definition.S)
_UNIT, _ANGLE, _TWO = _f32(definition.UNIT), _f32(definition.ANGLE), _f32(2.0)
_STRIDE, _TOP_BITS = _u32(definition.STRIDE), _u32(definition.TOP_BITS)
_VALUE, _MANTISSA, _ONE, _SIGN = _u32(0x3FFFFFFE), _u32(0x7FFFFF), _u32(0x3F800000), _u32(0x80000000)

_DTYPES = {torch.float32: None, torch.float64: None, torch.bfloat16: torch.uint16}
if binding.get_host_cpu_features().get("f16c", binding.get_default_triple().startswith("aarch64")):
    _DTYPES[torch.float16] = torch.int16  # without the instruction LLVM would call a function that is not there


def _widen(x):
    """A stored number as one to calculate with: bfloat16 comes as uint16, float16 as int16."""


def _narrow(x, like):
    """The number to store, rounded to nearest even."""


@overload(_widen)
def _widen_typed(x):
    if x == types.uint16:
        return lambda x: as_float(_u32(x) << _u32(16))
    if x == types.int16:
        return lambda x: from_half(x)
    return lambda x: x


@overload(_narrow)
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


_kernel = partial(kernel, version=f"{zlib.crc32(repr(_CONSTANTS).encode()):x}")


@njit(inline="always")
def _philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds in 64-bit lanes, of which only the low halves mean something."""
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


@njit(inline="always")
def _normals(z, chunk, c1, c2, c3, k0, k1):
    """The 128 normals of sixteen blocks."""
    for lane in range(16):
        w0, w1, w2, w3 = _philox(_u64(16 * chunk + lane), c1, c2, c3, k0, k1)
        z[lane], z[lane + 16] = _normal_pair(w0)
        z[lane + 32], z[lane + 48] = _normal_pair(w1)
        z[lane + 64], z[lane + 80] = _normal_pair(w2)
        z[lane + 96], z[lane + 112] = _normal_pair(w3)


@njit(inline="always")
def _signs(z, words, chunk, c1, c2, c3, k0, k1):
    """Two bits of each of the 64 words that 16 chunks share."""
    if chunk % 16 == 0:
        for lane in range(16):
            w0, w1, w2, w3 = _philox(_u64(chunk + lane), c1, c2, c3, k0, k1)
            words[lane], words[lane + 16], words[lane + 32], words[lane + 48] = w0, w1, w2, w3
    for i in range(2):
        shift = _u32(2 * (chunk % 16) + i)
        for lane in range(64):
            z[64 * i + lane] = as_float(((words[lane] << shift) & _SIGN) | _ONE)


@njit(inline="always")
def _numbers(z, words, gaussian, chunk, c1, c2, c3, k0, k1):
    if gaussian:
        _normals(z, chunk, c1, c2, c3, k0, k1)
    else:
        _signs(z, words, chunk, c1, c2, c3, k0, k1)


@_kernel
def _add(out, start, alpha, beta, gaussian, purpose, id0, id1, k0, k1):
    """out = beta * out + alpha * z for elements start .. of a tensor, start a multiple of TILE."""
    z, words = np.empty(_CHUNK, np.float32), np.empty(64, np.uint32)
    c1, c2, c3, k0, k1 = _u64(purpose), _u64(id0), _u64(id1), _u64(k0), _u64(k1)
    for here in range(0, out.size, _CHUNK):
        _numbers(z, words, gaussian, (start + here) // _CHUNK, c1, c2, c3, k0, k1)
        for i in range(min(_CHUNK, out.size - here)):
            e = _u64(here + i)  # numba asks of a signed index whether it is negative
            out[e] = _narrow(beta * _widen(out[e]) + alpha * z[i], out[e])


@_kernel
def _place(out, base, start, alpha, gaussian, purpose, id0, id1, k0, k1):
    """out = base + alpha * z, as _add."""
    z, words = np.empty(_CHUNK, np.float32), np.empty(64, np.uint32)
    c1, c2, c3, k0, k1 = _u64(purpose), _u64(id0), _u64(id1), _u64(k0), _u64(k1)
    for here in range(0, out.size, _CHUNK):
        _numbers(z, words, gaussian, (start + here) // _CHUNK, c1, c2, c3, k0, k1)
        for i in range(min(_CHUNK, out.size - here)):
            e = _u64(here + i)
            out[e] = _narrow(base[e] + alpha * z[i], out[e])


def supports(*tensors: torch.Tensor) -> bool:
    """Whether the kernels can work on these: contiguous, in main memory, of a floating type that is known here."""
    return all(t.device.type == "cpu" and t.dtype in _DTYPES and t.is_contiguous() for t in tensors)


def _array(tensor: torch.Tensor) -> np.ndarray:
    bits = _DTYPES[tensor.dtype]
    flat = tensor.detach().view(-1)
    return (flat if bits is None else flat.view(bits)).numpy()


def _counter(seed: int, tensor_id: int, purpose: int) -> tuple[int, ...]:
    low = definition._LOW
    return purpose, tensor_id & low, tensor_id >> 32 & low, seed & low, seed >> 32 & low


@_kernel
def _dot(other, sums, place, start, gaussian, purpose, id0, id1, k0, k1):
    """sums[place] = <z, other>, 128 sums side by side in float64."""
    z, words, lanes = np.empty(_CHUNK, np.float32), np.empty(64, np.uint32), np.zeros(_CHUNK, np.float64)
    c1, c2, c3, k0, k1 = _u64(purpose), _u64(id0), _u64(id1), _u64(k0), _u64(k1)
    for here in range(0, other.size, _CHUNK):
        _numbers(z, words, gaussian, (start + here) // _CHUNK, c1, c2, c3, k0, k1)
        for i in range(min(_CHUNK, other.size - here)):
            lanes[i] += z[i] * _widen(other[_u64(here + i)])
    sums[place] = lanes.sum()


@_kernel
def _squares(size, sums, place, start, gaussian, purpose, id0, id1, k0, k1):
    """sums[place] = |z|^2 of size numbers, summed as _dot."""
    z, words, lanes = np.empty(_CHUNK, np.float32), np.empty(64, np.uint32), np.zeros(_CHUNK, np.float64)
    c1, c2, c3, k0, k1 = _u64(purpose), _u64(id0), _u64(id1), _u64(k0), _u64(k1)
    for here in range(0, size, _CHUNK):
        _numbers(z, words, gaussian, (start + here) // _CHUNK, c1, c2, c3, k0, k1)
        for i in range(min(_CHUNK, size - here)):
            lanes[i] += np.float64(z[i]) * z[i]
    sums[place] = lanes.sum()


def _cut(size: int) -> range:
    """Where the pieces of an array begin that threads take: as many for each thread, small arrays whole."""
    threads = torch.get_num_threads()
    if size <= PIECE // 2 or threads == 1:
        return range(0, size, max(size, 1))
    count = threads * -(-size // (threads * PIECE))
    return range(0, size, -(-size // (count * definition.TILE)) * definition.TILE)


def _add_jobs(
    distribution: str, out: torch.Tensor, alpha: float, beta: float, seed: int, tensor_id: int, purpose: int, start: int
) -> list[tuple]:
    number, array, cut = _number(out), _array(out), _cut(out.numel())
    fixed = (number(alpha), number(beta), distribution == "gaussian", *_counter(seed, tensor_id, purpose))
    return [(array[here : here + cut.step], start + here, *fixed) for here in cut]


def add_(
    distribution: str, out: torch.Tensor, alpha: float, beta: float, seed: int, tensor_id: int, purpose: int, start: int
) -> None:
    """out = beta * out + alpha * z[start : start + out.numel()], in place, where supports(out)."""
    share(_add, _add_jobs(distribution, out, alpha, beta, seed, tensor_id, purpose, start))


def add_all_(
    distribution: str, moves: Iterable[tuple[int, torch.Tensor, float, float]], seed: int, purpose: int
) -> None:
    """add_ on whole tensors, given as (tensor id, out, alpha, beta), where supports(out)."""
    parts = (
        _add_jobs(distribution, out, alpha, beta, seed, tensor_id, purpose, 0) for tensor_id, out, alpha, beta in moves
    )
    share(_add, (job for jobs in parts for job in jobs))


def place_(
    distribution: str,
    out: torch.Tensor,
    base: torch.Tensor,
    alpha: float,
    seed: int,
    tensor_id: int,
    purpose: int,
    start: int,
) -> None:
    """out = base + alpha * z, rounded once, where supports(out, base)."""
    fixed = (_number(base)(alpha), distribution == "gaussian", *_counter(seed, tensor_id, purpose))
    to, origin, cut = _array(out), _array(base), _cut(out.numel())
    share(
        _place,
        [(to[here : here + cut.step], origin[here : here + cut.step], start + here, *fixed) for here in cut],
    )


def dot(distribution: str, other: torch.Tensor, seed: int, tensor_id: int, purpose: int) -> float:
    """<z, other> over a whole tensor, where supports(other); products in other's type, at least float32."""
    array, cut = _array(other), _cut(other.numel())
    sums = np.zeros(len(cut))
    fixed = (distribution == "gaussian", *_counter(seed, tensor_id, purpose))
    share(_dot, [(array[here : here + cut.step], sums, k, here, *fixed) for k, here in enumerate(cut)])
    return float(sums.sum())


def square(distribution: str, size: int, seed: int, tensor_id: int, purpose: int) -> float:
    """|z|^2 over a tensor of that size; products in float64."""
    cut = _cut(size)
    sums, fixed = np.zeros(len(cut)), (distribution == "gaussian", *_counter(seed, tensor_id, purpose))
    share(_squares, [(min(cut.step, size - here), sums, k, here, *fixed) for k, here in enumerate(cut)])
    return float(sums.sum())


def _number(tensor: torch.Tensor) -> type:
    """The type to calculate in."""
    return np.float64 if tensor.dtype == torch.float64 else np.float32
