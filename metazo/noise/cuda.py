"""Philox noise on CUDA with triton: generated and added in one pass, nothing stored.

The numbers are those of philox.py, bit for bit: raw Philox rounds, the same mapping, and no fusing of multiplication and
addition (enable_fp_fusion=False). Sixteen neighbours come from sixteen blocks, so that every load and store fills whole
sectors. float64 uses the plain form, because triton passes scalars in float32.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportOptionalSubscript=false
# (pyright checks triton kernels as the Python functions that they are before compilation)

from __future__ import annotations

import torch
import triton
import triton.language as tl

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
def _signed(value, bits):
    """value with its sign flipped if the top bit is set."""
    return (value.to(tl.uint32, bitcast=True) ^ (bits & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _normal_pair(word):
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
def _blend(out, base, offset, size, z, alpha, beta):
    inside = offset < size
    kept = tl.load(base + offset, inside).to(tl.float32)
    tl.store(out + offset, (beta * kept + alpha * z).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["first", "purpose", "id0", "id1", "k0", "k1", "alpha", "beta"])
def _kernel(
    out, base, size, first, alpha, beta, purpose, id0, id1, k0, k1, gaussian: tl.constexpr, blocks: tl.constexpr
):
    """out = beta * base + alpha * z for the elements from Philox block `first` on; one program handles `blocks` of them."""
    here = tl.program_id(0).to(tl.int64) * blocks + tl.arange(0, blocks)
    zero = tl.zeros((blocks,), tl.uint32)
    c1, c2, c3 = zero + purpose.to(tl.uint32), zero + id0.to(tl.uint32), zero + id1.to(tl.uint32)
    w0, w1, w2, w3 = _philox((here + first).to(tl.uint32), c1, c2, c3, k0.to(tl.uint32), k1.to(tl.uint32))
    if gaussian:
        place = here // 16 * 128 + here % 16
        for i in tl.static_range(4):
            word = w0 if i == 0 else w1 if i == 1 else w2 if i == 2 else w3
            z0, z1 = _normal_pair(word)
            _blend(out, base, place + 32 * i, size, z0, alpha, beta)
            _blend(out, base, place + 32 * i + 16, size, z1, alpha, beta)
    else:
        place = (here // 16 * 2048 + here % 16)[None, :]
        bit = tl.arange(0, 32)[:, None]
        one = tl.full((32, blocks), 1.0, tl.float32)
        for i in tl.static_range(4):
            word = w0 if i == 0 else w1 if i == 1 else w2 if i == 2 else w3
            z = _signed(one, word[None, :] << bit.to(tl.uint32))
            _blend(out, base, place + 64 * bit + 16 * i, size, z, alpha, beta)


def supports(*tensors: torch.Tensor) -> bool:
    """Whether the kernels support these tensors: contiguous, on a CUDA device, float32, bfloat16 or float16."""
    return all(t.is_cuda and t.dtype in _DTYPES and t.is_contiguous() for t in tensors)


def _int32(value: int) -> int:
    """Low 32 bits as a signed number: triton would compile again for a number that does not fit."""
    return (value & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def add_(
    distribution: str, out: torch.Tensor, alpha: float, beta: float, seed: int, tensor_id: int, purpose: int, start: int
) -> None:
    """out = beta * out + alpha * z[start : start + out.numel()], in place, if supports(out)."""
    _launch(distribution, out, out, alpha, beta, seed, tensor_id, purpose, start)


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
    """out = base + alpha * z, rounded once, if supports(out, base)."""
    _launch(distribution, out, base, alpha, 1.0, seed, tensor_id, purpose, start)


def _launch(distribution, out, base, alpha, beta, seed, tensor_id, purpose, start):
    gaussian = distribution == "gaussian"
    numbers, size = (8 if gaussian else 128), out.numel()
    blocks = _BLOCKS if gaussian else _BLOCKS // 16
    integers = (_int32(i) for i in (purpose, tensor_id, tensor_id >> 32, seed, seed >> 32))
    if size:
        _kernel[(triton.cdiv(size, blocks * numbers),)](
            out, base, size, _int32(start // numbers), float(alpha), float(beta), *integers,
            gaussian=gaussian, blocks=blocks, enable_fp_fusion=False,
        )  # fmt: skip
