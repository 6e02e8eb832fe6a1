"""Runs the triton kernels in triton's interpreter, without a GPU, and saves what they wrote; test_triton.py checks it.

    TRITON_INTERPRET=1 python -m tests.noise.interpreted FILE

The kernels are imported when they are needed: test modules use its numbers, also if triton is not installed.
"""

from __future__ import annotations

import sys
from itertools import product

import torch

from metazo.noise import philox
from tests.noise.test_split import weights

# Words above 2^31 in every place: triton's integers are signed, and it compiles again for a wider one.
SEED, TENSOR, PURPOSE = 0xF23456789ABCDEF0, 0xFEDCBA9876543210, 0xFFFF0001
KINDS = ("gaussian", "rademacher")
SIZES, STARTS = (77, 2051), (0, 6 * philox.TILE)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MATRICES = ((1, 1), (3, 300), (33, 7))


def noise_on_one_tensor() -> dict:
    from metazo.noise import cuda

    found = {}
    for kind, size, start, dtype in product(KINDS, SIZES, STARTS, DTYPES):
        base = torch.linspace(-3, 3, size)
        added, placed = base.clone().to(dtype), torch.zeros(size + 1, dtype=dtype)
        cuda.add_(kind, added, 0.3, 0.7, SEED, TENSOR, PURPOSE, start)
        cuda.place_(kind, placed[:size], base, 0.3, SEED, TENSOR, PURPOSE, start)
        found[kind, size, start, dtype] = added, placed
    return found


def noise_on_all_tensors() -> dict:
    """Each tensor is the inner part of a longer one."""
    from metazo.noise import cuda

    found, sizes, alphas = {}, (3, 2051, 1, 2048), [0.1 * k for k in range(4)]
    ids = [TENSOR + k for k in range(4)]
    for kind, dtype in product(KINDS, DTYPES):
        bases = [torch.linspace(-3, 3, size + 1)[1:] for size in sizes]
        outs = [torch.zeros(size + 2, dtype=dtype) for size in sizes]
        added, both = ([base.clone().to(dtype) for base in bases] for _ in range(2))
        cuda.place_all_(kind, list(zip(ids, [out[1:-1] for out in outs], bases, alphas)), SEED, PURPOSE)
        cuda.add_all_(kind, [(id, out, a, 0.7) for id, out, a in zip(ids, added, alphas)], SEED, PURPOSE)
        moves = [(id, out, a, 0.7, 0.3 - a) for id, out, a in zip(ids, both, alphas)]
        cuda.add_two_all_(kind, moves, (SEED, SEED + 1), PURPOSE)
        found[kind, dtype] = outs, added, both
    return found


def noise_on_split_weights() -> dict:
    from metazo.noise import cuda_split

    found = {}
    for kind, high, low, start in product(KINDS, (torch.bfloat16, torch.float16), (torch.int16, torch.int8), STARTS):
        w, rest = weights(2051, high, low)
        out = torch.zeros(2052, dtype=high)
        cuda_split.place_(kind, out[:-1], w, rest, 0.3, SEED, TENSOR, PURPOSE, start)
        cuda_split.add_(kind, w, rest, 0.3, 0.7, SEED, TENSOR, PURPOSE, start, SEED + 5)
        found[kind, high, low, start] = out, w, rest
    return found


def matrix(rows: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns + rank)
    shapes = ((rows, columns), (rows, rank), (columns, rank))
    base, left, right = (torch.randn(shape, generator=generator) for shape in shapes)
    return base, left, right


def products() -> dict:
    """Each matrix is the inner part of a longer vector."""
    from metazo.kernels import outer_cuda

    found = {}
    for rank, dtype in product((1, 2, 3, 8), (torch.float32, torch.float16)):
        outs, placements = [], []
        for rows, columns in MATRICES:
            base, left, right = matrix(rows, columns, rank)
            outs.append(torch.zeros(base.numel() + 2, dtype=dtype))
            placements.append((outs[-1][1:-1].view(base.shape), base, left, right, 0.3, 0.7))
        outer_cuda.place_products_(placements)
        found[rank, dtype] = outs
    return found


if __name__ == "__main__":
    made = (noise_on_one_tensor, noise_on_all_tensors, noise_on_split_weights, products)
    torch.save({make.__name__: make() for make in made}, sys.argv[1])
