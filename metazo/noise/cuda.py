"""Philox noise on CUDA with triton: generated and added in one pass, nothing stored.

The numbers are those of philox.py, bit for bit: raw Philox rounds, the same mapping, and no fusing of multiplication and
addition (enable_fp_fusion=False). Sixteen neighbours come from sixteen blocks, so that every load and store fills whole
sectors. float64 uses the plain form, because triton passes scalars in float32.

All tensors of a pass share one launch (metazo/kernels/launches.py).
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportOptionalSubscript=false
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# (pyright checks triton kernels as the Python functions that they are before compilation)

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from metazo.kernels.launches import as_float, ends, find, int64, table
from metazo.noise import philox as definition

_BLOCKS = 256  # Philox blocks per program: 2,048 normals or 32,768 signs
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_M0, _M1 = tl.constexpr(definition._M0), tl.constexpr(definition._M1)
_W0, _W1 = tl.constexpr(definition._W0), tl.constexpr(definition._W1)
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5 = (tl.constexpr(c) for c in definition.Q)
_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in definition.C)
_S0, _S1, _S2 = (tl.constexpr(c) for c in definition.S)
_UNIT, _ANGLE = tl.constexpr(definition.UNIT), tl.constexpr(definition.ANGLE)
_STRIDE, _TOP_BITS = tl.constexpr(definition.STRIDE), tl.constexpr(definition.TOP_BITS)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    m0, m1 = tl.full((), _M0, tl.uint32), tl.full((), _M1, tl.uint32)
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, m0), tl.umulhi(c2, m1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, c2 * m1, high0 ^ c3 ^ k1, c0 * m0
        k0 += tl.full((), _W0, tl.uint32)
        k1 += tl.full((), _W1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def words(block, purpose, id0, id1, k0, k1):
    """The four words of Philox blocks, (blocks,) each. block: int64, of which the low 32 bits count; all else: 32 bits."""
    zero = (block * 0).to(tl.uint32)
    c1, c2, c3 = zero + purpose.to(tl.uint32), zero + id0.to(tl.uint32), zero + id1.to(tl.uint32)
    return _philox(block.to(tl.uint32), c1, c2, c3, k0.to(tl.uint32), k1.to(tl.uint32))


@triton.jit
def _signed(value, bits):
    """value with its sign flipped if the top bit is set."""
    return (value.to(tl.uint32, bitcast=True) ^ (bits & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def normal_pair(word):
    """The two normals of a word."""
    # the interpreter needs tensors to the left of constants
    v = (word & 0x3FFFFFFE) | 1
    bits = v.to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    y = 2.0 - ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    q = ((((y * _Q0 + _Q1) * y + _Q2) * y + _Q3) * y + _Q4) * y + _Q5
    radius = tl.sqrt_rn((-(bits - _TOP_BITS)).to(tl.float32) * _UNIT - y * q)
    a = (v * tl.full((), _STRIDE, tl.uint32)).to(tl.int32, bitcast=True).to(tl.float32) * _ANGLE
    a2 = a * a
    c = ((a2 * _C0 + _C1) * a2 + _C2) * a2 + _C3
    s = ((a2 * _S0 + _S1) * a2 + _S2) * a
    return _signed(radius * (c - s), word), _signed(radius * (c + s), word << 1)


@triton.jit
def sign_rows(word, blocks: tl.constexpr):
    """The 32 signs of each word: (32, blocks), float32."""
    bit = tl.arange(0, 32)[:, None]
    return _signed(tl.full((32, blocks), 1.0, tl.float32), word[None, :] << bit.to(tl.uint32))


@triton.jit
def normal_places(block):
    """Where a block's first normal is; the others follow at multiples of 16."""
    return block // 16 * 128 + block % 16


@triton.jit
def sign_places(block):
    """Where the 32 signs of a block's first word are, (32, blocks); those of the next word follow at 16."""
    return (block // 16 * 2048 + block % 16)[None, :] + 64 * tl.arange(0, 32)[:, None]


@triton.jit
def _blend(out, base, place, size, z, z2, alpha, beta, again, two: tl.constexpr):
    inside = place < size
    value = beta * tl.load(base + place, inside).to(tl.float32) + alpha * z
    if two:  # as two passes would round it
        value = value.to(out.dtype.element_ty).to(tl.float32) + again * z2
    tl.store(out + place, value.to(out.dtype.element_ty), inside)


@triton.jit
def _tensor(
    out, base, size, first, program, alpha, beta, again, purpose, id0, id1, k0, k1, l0, l1,
    gaussian: tl.constexpr, two: tl.constexpr, blocks: tl.constexpr,
):  # fmt: skip
    """out = beta * base + alpha * z(k) (+ again * z(l)) on the entries of one program; `first` is the first block of z."""
    here = program * blocks + tl.arange(0, blocks)
    w0, w1, w2, w3 = words(here + first, purpose, id0, id1, k0, k1)
    v0, v1, v2, v3 = w0, w1, w2, w3
    if two:
        v0, v1, v2, v3 = words(here + first, purpose, id0, id1, l0, l1)
    if gaussian:
        place = normal_places(here)
        for i in tl.static_range(4):
            word = w0 if i == 0 else w1 if i == 1 else w2 if i == 2 else w3
            z0, z1 = normal_pair(word)
            y0, y1 = z0, z1
            if two:
                other = v0 if i == 0 else v1 if i == 1 else v2 if i == 2 else v3
                y0, y1 = normal_pair(other)
            _blend(out, base, place + 32 * i, size, z0, y0, alpha, beta, again, two)
            _blend(out, base, place + 32 * i + 16, size, z1, y1, alpha, beta, again, two)
    else:
        place = sign_places(here)
        for i in tl.static_range(4):
            word = w0 if i == 0 else w1 if i == 1 else w2 if i == 2 else w3
            z = sign_rows(word, blocks)
            y = z
            if two:
                other = v0 if i == 0 else v1 if i == 1 else v2 if i == 2 else v3
                y = sign_rows(other, blocks)
            _blend(out, base, place + 16 * i, size, z, y, alpha, beta, again, two)


@triton.jit(do_not_specialize=["first", "purpose", "id0", "id1", "k0", "k1", "alpha", "beta"])
def _one(
    out, base, size, first, alpha, beta, purpose, id0, id1, k0, k1, gaussian: tl.constexpr, blocks: tl.constexpr
):  # fmt: skip
    """One tensor, or a part of one."""
    program = tl.program_id(0).to(tl.int64)
    _tensor(
        out, base, size, first, program, alpha, beta, beta, purpose, id0, id1, k0, k1, k0, k1, gaussian, False, blocks
    )  # fmt: skip


@triton.jit
def _many(
    table, ends, like, base_like,
    gaussian: tl.constexpr, two: tl.constexpr, aligned: tl.constexpr, blocks: tl.constexpr,
):  # fmt: skip
    """All tensors of a table (see _launch_all). like, base_like: tensors of the types of out and base."""
    program = tl.program_id(0).to(tl.int64)
    count, purpose = tl.load(table), tl.load(table + 1)
    seed, seed2 = tl.load(table + 2), tl.load(table + 3)
    k, begin = find(ends, count, program)
    row = table + (k + 1) * 7
    out = tl.load(row).to(tl.pointer_type(like.dtype.element_ty))
    base = tl.load(row + 1).to(tl.pointer_type(base_like.dtype.element_ty))
    if aligned:
        out, base = tl.multiple_of(out, 16), tl.multiple_of(base, 16)
    size, id = tl.load(row + 2), tl.load(row + 3)
    alpha, beta, again = as_float(tl.load(row + 4)), as_float(tl.load(row + 5)), as_float(tl.load(row + 6))
    _tensor(
        out, base, size, program * 0, program - begin, alpha, beta, again,
        purpose, id, id >> 32, seed, seed >> 32, seed2, seed2 >> 32, gaussian, two, blocks,
    )  # fmt: skip


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels support these tensors: contiguous, on a CUDA device, float32, bfloat16 or float16."""
    return all(t.is_cuda and t.dtype in _DTYPES and t.is_contiguous() for t in tensors)


def int32(value: int) -> int:
    """Low 32 bits as a signed number: triton would compile again for a number that does not fit."""
    return (value & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def cut(distribution: str) -> tuple[bool, int, int]:
    """(gaussian, Philox blocks per program, entries per program)"""
    gaussian = distribution == "gaussian"
    blocks = _BLOCKS if gaussian else _BLOCKS // 16
    return gaussian, blocks, blocks * (8 if gaussian else 128)


def add_(
    distribution: str, out: Tensor, alpha: float, beta: float, seed: int, tensor_id: int, purpose: int, start: int
) -> None:
    """out = beta * out + alpha * z[start : start + out.numel()], in place, if supports(out)."""
    _launch(distribution, out, out, alpha, beta, seed, tensor_id, purpose, start)


def place_(
    distribution: str,
    out: Tensor,
    base: Tensor,
    alpha: float,
    seed: int,
    tensor_id: int,
    purpose: int,
    start: int,
) -> None:
    """out = base + alpha * z, rounded once, if supports(out, base)."""
    _launch(distribution, out, base, alpha, 1.0, seed, tensor_id, purpose, start)


def _launch(distribution, out, base, alpha, beta, seed, tensor_id, purpose, start):
    gaussian, blocks, entries = cut(distribution)
    integers = (int32(i) for i in (purpose, tensor_id, tensor_id >> 32, seed, seed >> 32))
    if size := out.numel():
        with torch.cuda.device_of(out):
            _one[(triton.cdiv(size, entries),)](
                out, base, size, int32(start // (entries // blocks)), float(alpha), float(beta), *integers,
                gaussian=gaussian, blocks=blocks, enable_fp_fusion=False,
            )  # fmt: skip


Row = tuple[int, Tensor, Tensor, float, float, float]
"""(tensor id, out, base, alpha, beta, again)"""


def add_all_(distribution: str, moves: Iterable[tuple[int, Tensor, float, float]], seed: int, purpose: int) -> None:
    """add_ on whole tensors, given as (tensor id, out, alpha, beta), if supports(out)."""
    _launch_all(distribution, [(id, out, out, alpha, beta, 0.0) for id, out, alpha, beta in moves], (seed,), purpose)


def place_all_(distribution: str, places: Iterable[tuple[int, Tensor, Tensor, float]], seed: int, purpose: int) -> None:
    """place_ on whole tensors, given as (tensor id, out, base, alpha), if supports(out, base)."""
    _launch_all(distribution, [(id, out, base, alpha, 1.0, 0.0) for id, out, base, alpha in places], (seed,), purpose)


def add_two_all_(
    distribution: str, moves: Iterable[tuple[int, Tensor, float, float, float]], seeds: tuple[int, int], purpose: int
) -> None:
    """out = beta * out + alpha * z(seeds[0]) + again * z(seeds[1]) on whole tensors, in one pass, if supports(out).

    moves: (tensor id, out, alpha, beta, again). The result is bit-identical to add_all_ with the first seed, then with the
    second, because the sum between the two is rounded to out's type.
    """
    _launch_all(
        distribution, [(id, out, out, alpha, beta, more) for id, out, alpha, beta, more in moves], seeds, purpose
    )


def _launch_all(distribution: str, rows: Sequence[Row], seeds: Sequence[int], purpose: int) -> None:
    """One launch for all tensors of the same types, from a table of int64 on the device.

    Row 0: number of tensors, purpose, seeds. A row per tensor: addresses of out and base, size, id, and the bits of alpha,
    beta and again.
    """
    gaussian, blocks, entries = cut(distribution)
    alike = defaultdict(list)
    for row in rows:
        if row[1].numel():
            alike[row[1].device, row[1].dtype, row[2].dtype].append(row)
    for (device, _, _), group in alike.items():
        integers = [(out.data_ptr(), base.data_ptr(), out.numel(), int64(id)) for id, out, base, *_ in group]
        head = [len(group), purpose, int64(seeds[0]), int64(seeds[-1])]
        aligned = not any(pointer % 16 for row in integers for pointer in row[:2])
        programs = tuple(-(-row[2] // entries) for row in integers)
        with torch.cuda.device_of(group[0][1]):
            _many[(sum(programs),)](
                table(head, integers, [row[3:] for row in group], device), ends(programs, device), *group[0][1:3],
                gaussian=gaussian, two=len(seeds) == 2, aligned=aligned, blocks=blocks, enable_fp_fusion=False,
            )  # fmt: skip
