"""Spans the triton kernels in triton's interpreter, without a GPU, and saves what they wrote; test_triton.py checks it.

    TRITON_INTERPRET=1 python -m tests.noise.interpreted FILE

The kernels are imported when they are needed: test modules use its numbers, also if triton is not installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch

from metazo.blocks import spans_of
from metazo.noise import philox
from tests.noise.test_split import weights

# Words above 2^31 in every place: triton's integers are signed, and it compiles again for a wider one.
SEED, TENSOR, PURPOSE = 0xF23456789ABCDEF0, 0xFEDCBA9876543210, 0xFFFF0001
KINDS = ("gaussian", "rademacher")
PLACES = ((77, 0), (2051, 6 * philox.TILE))
"""(size, first entry): one program, whose first entry is the tensor's; and two, the last of which has three entries."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MATRICES = ((1, 1), (3, 300), (33, 7))


def noise_on_one_tensor() -> dict:
    from metazo.noise import cuda

    found = {}
    for kind, (size, start), dtype in product(KINDS, PLACES, DTYPES):
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
    for kind, dtype in (*product(KINDS[:1], DTYPES), (KINDS[1], DTYPES[0])):  # dtypes of signs: above
        bases = [torch.linspace(-3, 3, size + 1)[1:] for size in sizes]
        outs = [torch.zeros(size + 2, dtype=dtype) for size in sizes]
        added, both = ([base.clone().to(dtype) for base in bases] for _ in range(2))
        cuda.place_all_(kind, list(zip(ids, [out[1:-1] for out in outs], bases, alphas)), SEED, PURPOSE)
        cuda.add_all_(kind, [(id, out, a, 0.7) for id, out, a in zip(ids, added, alphas)], SEED, PURPOSE)
        moves = [(id, out, a, 0.7, 0.3 - a) for id, out, a in zip(ids, both, alphas)]
        cuda.add_two_all_(kind, moves, (SEED, SEED + 1), PURPOSE)
        found[kind, dtype] = outs, added, both
    return found


def shards() -> list[tuple[torch.Size, tuple[np.ndarray, ...]]]:
    """Whole shapes, and the positions per dimension that a shard has: columns, rows from the middle of a tile, blocks of
    both, and positions with a gap."""
    cut = ((3, 700), np.arange(3), np.arange(300, 600)), ((5, 500), np.arange(3, 5), np.arange(500))
    cut += ((4, 700), np.arange(1, 3), np.arange(40, 290)), ((2, 90), np.arange(2), np.r_[3:20, 60:90])
    return [(torch.Size(shape), places) for shape, *places in cut]


def piece(whole: torch.Tensor, places: Sequence[np.ndarray]) -> torch.Tensor:
    """The shard of a tensor, by indices."""
    return whole[np.ix_(*places)].contiguous()


def noise_on_shards() -> dict:
    """Added, to float16 placed. Each shard is the inner part of a longer vector."""
    from metazo.noise import cuda_shards

    found, alphas = {}, [0.1 * (k + 1) for k in range(4)]
    spans, ids = [spans_of(places, shape) for shape, places in shards()], [TENSOR + k for k in range(4)]
    for kind, dtype in (*product(KINDS[:1], DTYPES), (KINDS[1], DTYPES[0])):  # dtypes of signs: above
        bases = [piece(torch.linspace(-3, 3, shape.numel()).view(shape), places).view(-1) for shape, places in shards()]
        longer = [torch.zeros(len(base) + 2, dtype=dtype) for base in bases]
        outs = [out[1:-1] for out in longer]
        if dtype == torch.float16:
            cuda_shards.place_all_(kind, list(zip(ids, outs, bases, alphas, spans)), SEED, PURPOSE)
        else:
            for out, base in zip(outs, bases):
                out.copy_(base)
            cuda_shards.add_all_(kind, list(zip(ids, outs, alphas, [0.7] * 4, spans)), SEED, PURPOSE)
        found[kind, dtype] = longer
    return found


def noise_on_split_weights() -> dict:
    from metazo.noise import cuda_split

    found = {}
    for kind, high, low in product(KINDS, (torch.bfloat16, torch.float16), (torch.int16, torch.int8)):
        start = PLACES[(kind == KINDS[0]) ^ (low == torch.int8)][1]
        w, rest = weights(2051, high, low)
        out = torch.zeros(2052, dtype=high)
        cuda_split.place_(kind, out[:-1], w, rest, 0.3, SEED, TENSOR, PURPOSE, start)
        cuda_split.add_(kind, w, rest, 0.3, 1.7, SEED, TENSOR, PURPOSE, start, SEED + 5)
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
    made = (noise_on_one_tensor, noise_on_all_tensors, noise_on_shards, noise_on_split_weights, products)
    torch.save({make.__name__: make() for make in made}, sys.argv[1])
