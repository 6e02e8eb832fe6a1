"""Tensors in pieces for one call of a loop: every entry once, whatever the sizes, types and threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit

from metazo.blocks import NamedTensor, tensor_id
from metazo.kernels.outer import add_products_
from metazo.kernels.pieces import ALIGN, JOB_ENTRIES, at, groups, matrix, pieces
from metazo.noise import TILE, Move, PhiloxNoise, add_two_all_

SIZES = (0, 1, 255, 2049, JOB_ENTRIES // 2 + 1, 3, 3 * JOB_ENTRIES + 5, 0, 7)


@pytest.mark.parametrize("size", SIZES)
def test_pieces_are_the_whole_and_begin_where_noise_can(threads, size):
    starts = pieces(size)
    assert ALIGN == TILE and all(start % ALIGN == 0 for start in starts)
    ends = [min(start + starts.step, size) for start in starts]
    assert [*starts, size][: len(starts) + 1] == [0, *ends][: len(starts) + 1] and [0, *ends][-1] == size
    assert threads == 1 or all(end - start <= JOB_ENTRIES for start, end in zip(starts, ends))


def test_groups_have_every_piece_once_and_no_thread_waits_for_a_long_one(threads):
    for sizes in ([], [5], [0, 0], [40_000] * 39, [JOB_ENTRIES] * 9, list(SIZES)):
        found = groups(sizes)
        assert [k for first, end in found for k in range(first, end)] == [*range(len(sizes))]
        assert all(sum(sizes[first : end - 1]) < JOB_ENTRIES for first, end in found)
    if threads > 1:
        assert len(groups([40_000] * 39)) >= 3 * threads


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16])
def test_an_array_at_an_address_is_the_memory_there(dtype):
    @njit
    def doubled(row, like):
        flat, square = at(row[0], row[1], like), matrix(row[0], 3, 4, like)
        for k in range(flat.size):
            flat[k] += dtype(k)
        square[2, 1] = dtype(100)

    memory = np.ones(12, dtype)
    doubled(np.array([memory.ctypes.data, 12]), memory[:0])
    assert memory.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 100, 11, 12]


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_tensors_of_every_type_in_one_call_are_as_each_by_the_definition(threads, distribution):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    named = []
    for k, size in enumerate(SIZES):
        start = torch.linspace(-1, 1, size, dtype=dtypes[k % 4])
        named.append(NamedTensor(f"t{k}", torch.nn.Parameter(start), tensor_id(f"t{k}")))
    moved = {}
    for backend in ("auto", "torch"):
        noise = PhiloxNoise(3, distribution, backend)
        moves = [Move(t, t.param.detach().clone(), 0.1 + k, 0.9) for k, t in enumerate(named)]
        first, second = noise.stream(5), noise.stream(6)
        first.add_all_(moves)
        add_two_all_(first, second, moves, [0.3 * k for k in range(len(moves))])
        moved[backend] = [move.out for move in moves]
    assert all(one.equal(other) for one, other in zip(*moved.values()))


def test_factors_of_other_types_and_layouts_live_until_they_are_added():
    """The loop knows addresses alone, and the factors of its own type are temporaries."""
    products = []
    for k in range(3):
        left = torch.full((2, 400), k + 1.0, dtype=torch.float64).t()
        products.append((torch.zeros(400, 1100), left, torch.ones(1100, 2).bfloat16(), 0.5, 1.0))
    add_products_(products)
    assert [out.unique().tolist() for out, *_ in products] == [[1.0], [2.0], [3.0]]
