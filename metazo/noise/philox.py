"""The noise of metazo, defined: z = f(seed, tensor, element) from Philox-4x32-10 counters.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Element e of a tensor is word e % 4 of the
Philox block with

    counter = (e // 4, purpose, low 32 bits of the tensor's id, high 32 bits),    key = (low, high 32 bits of the seed)

so a number depends on nothing else: not on chunks, threads, order, or which other tensors are trained. Words 0, 1 and
words 2, 3 make two pairs of normals (Box-Muller); a Rademacher sign is one bit. The mapping uses only float32
additions, multiplications and square roots in a stated order, so that every backend gives the same numbers to the last
bit on hardware that does not fuse them. This file is the plain form, in torch, on any device; cpu.py is the fast one.
"""

from __future__ import annotations

import math

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF

# ln(1 + t) = t - t^2 / 2 + t^3 P(t) for sqrt(1/2) <= 1 + t < sqrt(2), within 1e-7; the constants are Cephes' (logf).
LOG_POLYNOMIAL = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
# sin a = a + a^3 S(a^2), cos a = 1 - a^2 / 2 + a^4 C(a^2) for |a| <= pi / 4 (Cephes' sinf, cosf).
SIN_POLYNOMIAL = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_POLYNOMIAL = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
ANGLE = math.pi / 2**33  # a quadrant, pi / 2, in units of a 32-bit integer that holds 30 random bits above two zeros
SQRT_HALF_BITS = 0x3F3504F3


def philox(counter: tuple, key: tuple) -> tuple:
    """Ten rounds of Philox-4x32.

    Args: counter, four; key, two: int64 tensors or ints that hold unsigned 32-bit values (broadcast together).
    Returns: four int64 tensors of unsigned 32-bit words, or ints where all arguments are.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # int64 products wrap, their bits are those of the unsigned product
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def words(
    seed: int, tensor_id: int, purpose: int, start: int, count: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Random 32-bit words of blocks start .. start + count - 1. Returns: (count, 4), int64."""
    block = torch.arange(start, start + count, dtype=torch.int64, device=device)
    if start + count > 2**32:
        raise OverflowError("a tensor of more than 2^34 elements has no noise of its own")
    counter = (block, purpose, tensor_id & _LOW, (tensor_id >> 32) & _LOW)
    return torch.stack(torch.broadcast_tensors(*philox(counter, (seed & _LOW, (seed >> 32) & _LOW))), dim=1)


def _polynomial(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _log(u: torch.Tensor) -> torch.Tensor:
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    t = (bits - (exponent << 23)).view(torch.float32) - 1.0
    t2 = t * t
    return (_polynomial(LOG_POLYNOMIAL, t) * t * t2 - 0.5 * t2 + t) + math.log(2) * exponent.float()


def normal_pair(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two standard normals, float32, from two tensors of 32-bit words (Box-Muller).

    The radius takes 31 bits of x (so |z| <= 6.66), the angle 30 bits of y; the top two bits of y are its quadrant.
    """
    # torch's float32 square root is not correctly rounded everywhere (MKL); through float64 it is.
    radius = torch.sqrt((-2.0 * _log(((x >> 1).float() + 0.5) * 2.0**-31)).double()).float()
    low = (y << 2) & _LOW
    angle = torch.where(low >= 2**31, low - 2**32, low).float() * ANGLE
    a2 = angle * angle
    sine = _polynomial(SIN_POLYNOMIAL, a2) * a2 * angle + angle
    cosine = _polynomial(COS_POLYNOMIAL, a2) * a2 * a2 - 0.5 * a2 + 1.0
    swap, sign = ((y >> 30) & 1).bool(), 1.0 - 2.0 * (y >> 31).float()
    return radius * (torch.where(swap, -sine, cosine) * sign), radius * (torch.where(swap, cosine, sine) * sign)


def gaussian(
    seed: int, tensor_id: int, purpose: int, start: int, stop: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Normals of elements start .. stop - 1 of a tensor. Returns: (stop - start,), float32."""
    first = start // 4
    w = words(seed, tensor_id, purpose, first, -(-stop // 4) - first, device)
    z = torch.stack(normal_pair(w[:, 0], w[:, 1]) + normal_pair(w[:, 2], w[:, 3]), dim=1).reshape(-1)
    return z[start - 4 * first : stop - 4 * first]


def rademacher(
    seed: int, tensor_id: int, purpose: int, start: int, stop: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Signs of elements start .. stop - 1: bit e % 32 of word (e // 32) % 4 of block e // 128; a set bit is -1."""
    first = start // 128
    w = words(seed, tensor_id, purpose, first, -(-stop // 128) - first, device)
    bits = (w.unsqueeze(-1) >> torch.arange(32, device=device)) & 1
    return (1.0 - 2.0 * bits.float()).reshape(-1)[start - 128 * first : stop - 128 * first]


DISTRIBUTIONS = {"gaussian": gaussian, "rademacher": rademacher}
