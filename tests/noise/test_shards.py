"""Shards of tensors: their spans, and their noise, which is a slice of the whole tensor's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from metazo.blocks import LocalShard, NamedTensor, spans_of
from metazo.noise import TILE, Move, PhiloxNoise, Place, add_two_all_
from tests.noise.interpreted import piece

# The shape of the whole tensor, and the positions that the shard has in each dimension.
CASES: dict[str, tuple[tuple[int, ...], tuple[np.ndarray, ...]]] = {
    "rows": ((200, 33), (np.arange(71, 200), np.arange(33))),
    "columns": ((60, 33), (np.arange(60), np.arange(5, 20))),
    "long rows": ((3, 9000), (np.arange(3), np.arange(2900, 8000))),
    "block": ((50, 300), (np.arange(10, 40), np.r_[3:100, 250:290])),
    "strided rows": ((6000, 2), (np.r_[0:1500, 3000:4500], np.arange(2))),
    "three dimensions": ((7, 9, 11), (np.arange(7), np.arange(2, 5), np.arange(3, 9))),
    "the last of three": ((20, 3, 700), (np.arange(3, 9), np.arange(3), np.arange(350))),
    "a vector": ((5000,), (np.arange(2100, 4999),)),
    "everything": ((60, 50), (np.arange(60), np.arange(50))),
    "no rows": ((4, 3), (np.arange(0), np.arange(3))),
    "no columns": ((4, 3), (np.arange(4), np.arange(0))),
}
each_case = pytest.mark.parametrize("case", CASES)
each_distribution = pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])


def named(values: Tensor, name: str = "w") -> NamedTensor:
    return NamedTensor(name, torch.nn.Parameter(values), 5)


def shard(case: str, values: Tensor, name: str = "w") -> NamedTensor:
    shape, places = CASES[case]
    local = LocalShard(piece(values, places), True, places, torch.Size(shape))  # type: ignore[call-arg]
    return NamedTensor(name, local, 5)


@each_case
def test_runs_are_the_entries_in_order(case):
    shape, places = CASES[case]
    wanted = piece(torch.arange(np.prod(shape)).view(shape), places).flatten().tolist()
    spans = spans_of(places, shape)
    for start, stop in ((0, len(wanted)), (len(wanted) // 3, len(wanted) // 2), (1, len(wanted))):
        part = spans.part(start, max(start, stop)) if wanted else spans
        found = [
            n
            for first, here, end in zip(part.there, part.here, part.here[1:])
            for n in range(first, first + end - here)
        ]
        assert found == wanted[start:stop] == part.entries().tolist()
        assert (np.diff(part.here) > 0).all()
        assert (part.there[1:] > part.there[:-1] + np.diff(part.here)[:-1]).all()  # no two spans could be one


@each_case
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_square_of_a_shards_noise_is_that_of_the_whole_tensor(case, backend):
    values = torch.zeros(CASES[case][0])
    stream = PhiloxNoise(1, "gaussian", backend).stream(9)
    assert stream.square(shard(case, values)) == stream.square(named(values)) > 0


@each_case
@each_distribution
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*(("auto", t) for t in (torch.float32, torch.bfloat16, torch.float64)), ("torch", torch.float32)],
)
def test_noise_is_a_slice_of_the_whole_tensors(case, distribution, backend, dtype):
    shape, places = CASES[case]
    values = torch.linspace(-1, 1, int(np.prod(shape))).view(shape).to(dtype)
    pair, stream = (named(values), shard(case, values)), PhiloxNoise(1, distribution, backend).stream(9)
    assert stream.draw(pair[1]).equal(piece(stream.draw(pair[0]), places))
    again = PhiloxNoise(1, distribution, backend).stream(8)

    def two(tensor: NamedTensor, out: Tensor) -> None:
        add_two_all_(stream, again, [Move(tensor, out, 0.3, 0.7)], [-0.2])

    for call in (
        lambda tensor, out: stream.add_(tensor, out, 0.3, 0.7),
        lambda tensor, out: stream.add_all_([Move(tensor, out, 0.3, 0.7)]),
        two,
        lambda tensor, out: stream.place_(tensor, out, torch.full(out.shape, 0.1), 0.3),
        lambda tensor, out: stream.place_all_([Place(tensor, out, torch.full(out.shape, 0.1), 0.3)]),
    ):
        outs = [tensor.param.detach().clone() for tensor in pair]
        for tensor, out in zip(pair, outs):
            call(tensor, out)
        assert outs[1].equal(piece(outs[0], places))
    size = pair[1].param.numel()
    for start in range(TILE, size, TILE):
        assert stream.draw(pair[1], start=start, count=size - start).equal(stream.draw(pair[1]).flatten()[start:])


@each_distribution
def test_noise_does_not_depend_on_threads_or_on_other_tensors(distribution):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(1500, 1001, generator=generator)
    places = (np.arange(1500), np.arange(300, 901))
    local = LocalShard(piece(whole, places), True, places, whole.shape)  # type: ignore[call-arg]
    pair, stream = (named(whole), NamedTensor("w", local, 5)), PhiloxNoise(1, distribution).stream(9)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = [tensor.param.detach().clone() for tensor in pair]
            stream.add_all_([Move(tensor, values, 0.3, 0.7) for tensor, values in zip(pair, out)])
            outs.append(out)
    finally:
        torch.set_num_threads(before)
    assert outs[0][1].equal(piece(outs[0][0], places)) and outs[0][1].equal(outs[1][1])


def test_a_shard_is_refused_by_what_needs_whole_tensors():
    rows = shard("rows", torch.ones(200, 33))
    first = NamedTensor("w", LocalShard(torch.ones(2, 3), True, (np.arange(2), np.arange(3)), torch.Size([4, 3])), 5)  # type: ignore[call-arg]
    stream, narrow = PhiloxNoise(1).stream(9), torch.ones(2, 3, dtype=torch.bfloat16)
    for tensor in (rows, first):
        for call in (
            lambda: stream.dot(tensor, torch.ones(2, 3)),
            lambda: stream.draw(tensor, (3,)),
            lambda: stream.place_split_(tensor, narrow.clone(), narrow, torch.zeros(2, 3, dtype=torch.int16), 0.3),
            lambda: stream.add_split_(tensor, narrow, torch.zeros(2, 3, dtype=torch.int16), 0.3, 1.0, 0),
        ):
            with pytest.raises(ValueError, match="w is a shard"):
                call()
