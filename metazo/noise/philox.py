"""The noise of metazo, defined: z = f(seed, tensor, element) from Philox-4x32-10 counters. Version 2.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The block b of a tensor is four 32-bit words,

    counter = (b, purpose, low 32 bits of the tensor's id, high 32 bits),    key = (low, high 32 bits of the seed)

so a number does not depend on chunks, threads, order, or which other tensors are trained. A block gives n numbers:
8 normals (a pair per word, Box-Muller) or 128 signs (one per bit). Sixteen blocks are interleaved, so that a vector unit
fills sixteen neighbours at once: element e is number (e // 16) % n of block e // (16 n) * 16 + e % 16.

The mapping uses only bit operations and float32 additions, multiplications and square roots in a fixed order, so that
every backend that does not fuse them gives bit-identical numbers. This file is the plain form, in torch, for any device;
cpu.py and cuda.py are the fast forms.
"""

from __future__ import annotations

import math

import torch

from metazo.errors import UserError

LANES = 16
TILE = 2048  # elements: a chunk of a tensor may start at a multiple, because 16 blocks of normals or one of signs begin there

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF

# Radius: -2 ln(v / 2^30) = (bits(2^30) - bits(float(v))) UNIT - y Q(y), y = 2 - mantissa. The first term interpolates the
# logarithm between powers of two; Q is the minimax correction (3e-6), its mean error 0 so that E r^2 = 2, and
# Q(1) < 0 so that nothing below 0 reaches the square root.
UNIT = 2 * math.log(2) / 2**23
TOP_BITS = 0x4E800000  # the bits of the float32 2^30
Q = (-0.03604494, 0.04671151, -0.07901543, -0.06496407, -0.25316072, 0.38647315)
# Angle: a = signed(v STRIDE mod 2^32) ANGLE in (-pi / 4, pi / 4). The points (v, v STRIDE) are a lattice (Korobov) whose
# continued fraction has no quotient above 3, so radius and angle share 29 bits and yet fill the square evenly.
STRIDE = 0x4F1DFFFC
ANGLE = math.pi / 4 / 2**31
# cos a / sqrt 2 = C(a^2), sin a / sqrt 2 = a S(a^2), minimax within 2e-8 and 4e-7.
C = (-0.0009606688, 0.029454552, -0.35355238, 0.70710676)
S = (0.005742809, -0.11780514, 0.70710324)


def philox(counter: tuple, key: tuple) -> tuple:
    """Ten rounds of Philox-4x32.

    Args: counter, four; key, two: int64 tensors or ints that hold unsigned 32-bit values (broadcast together).
    Returns: four int64 tensors of unsigned 32-bit words, or ints if all arguments are ints.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # int64 products wrap; their bits are those of the unsigned product
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def words(
    seed: int, tensor_id: int, purpose: int, start: int, count: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Random 32-bit words of blocks start .. start + count - 1. Returns: (count, 4), int64."""
    block = torch.arange(start, start + count, dtype=torch.int64, device=device)
    if start + count > 2**32:
        raise OverflowError("the noise of a tensor has at most 2^35 elements")
    counter = (block, purpose, tensor_id & _LOW, (tensor_id >> 32) & _LOW)
    return torch.stack(torch.broadcast_tensors(*philox(counter, (seed & _LOW, (seed >> 32) & _LOW))), dim=1)


def _polynomial(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def normal_pair(word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two standard normals, float32, from a tensor of 32-bit words (Box-Muller).

    Bits 31 and 30 are their signs, independent of the rest: odd moments vanish exactly. Bits 29 to 1, with a set bit
    after them, are v, of which the radius (at most 6.45) and the angle in the quadrant are made. Raises UserError on a device
    without float64.
    """
    v = (word & 0x3FFFFFFE) | 1
    bits = v.float().view(torch.int32)
    y = 2.0 - ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    squared = (TOP_BITS - bits).float() * UNIT - y * _polynomial(Q, y)
    try:
        radius = torch.sqrt(squared.double()).float()  # torch's float32 square root is not correctly rounded everywhere
    except TypeError as error:  # MPS
        raise UserError(
            f"The noise needs float64, which devices of the kind {word.device.type} do not have: move the model to cpu or cuda."
        ) from error
    turn = (v * STRIDE) & _LOW
    a = torch.where(turn >= 2**31, turn - 2**32, turn).float() * ANGLE
    a2 = a * a
    c, s = _polynomial(C, a2), _polynomial(S, a2) * a
    signs = [1.0 - 2.0 * ((word >> bit) & 1).float() for bit in (31, 30)]
    return radius * (c - s) * signs[0], radius * (c + s) * signs[1]


def _elements(numbers: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Numbers (blocks, n) in the order of elements; start .. stop - 1, counted from the first of these blocks."""
    return numbers.view(-1, LANES, numbers.shape[1]).transpose(1, 2).reshape(-1)[start:stop]


def gaussian(
    seed: int, tensor_id: int, purpose: int, start: int, stop: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Normals of elements start .. stop - 1 of a tensor: numbers 2 i and 2 i + 1 of a block are the pair of word i.

    Returns: (stop - start,), float32.
    """
    size = LANES * 8
    first = start // size
    w = words(seed, tensor_id, purpose, first * LANES, (-(-stop // size) - first) * LANES, device)
    z = torch.stack(normal_pair(w), dim=-1).view(-1, 8)
    return _elements(z, start - size * first, stop - size * first)


def rademacher(
    seed: int, tensor_id: int, purpose: int, start: int, stop: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Signs of elements start .. stop - 1: number i of a block is bit 31 - i // 4 of word i % 4; a set bit is -1.

    Returns: (stop - start,), float32.
    """
    size = LANES * 128
    first = start // size
    w = words(seed, tensor_id, purpose, first * LANES, (-(-stop // size) - first) * LANES, device)
    bits = (w.unsqueeze(1) >> torch.arange(31, -1, -1, device=device).view(-1, 1)) & 1  # (blocks, 32, 4)
    return _elements((1.0 - 2.0 * bits.float()).view(-1, 128), start - size * first, stop - size * first)


DISTRIBUTIONS = {"gaussian": gaussian, "rademacher": rademacher}
