"""Directions on shards of tensors: entries of those on the whole tensor, bit for bit, however both are cut into chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from metazo import blocks
from metazo.blocks import ALIGN, NamedTensor, chunks
from metazo.noise import PhiloxNoise
from metazo.optimizers import HiZOOL
from metazo.step.directions import Direction, Isotropic, Reflected
from tests.noise.interpreted import piece
from tests.noise.test_shards import CASES, named, shard

each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CHUNK", ALIGN)


def drawn(direction: Direction, tensor: NamedTensor) -> Tensor:
    """d, drawn as a step draws it."""
    stream = PhiloxNoise(1).stream(9)
    parts = [direction.draw(stream, tensor, start=a, count=b - a) for a, b in chunks(tensor.param)]
    return torch.cat([*parts, torch.empty(0)]).view(tensor.param.shape)


@each_case
def test_reflected_noise_of_a_shard_is_cut_from_that_of_the_whole_tensor(case):
    shape, places = CASES[case]
    whole, part = named(torch.zeros(shape)), shard(case, torch.zeros(shape))
    row = int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
    a = torch.linspace(-1, 2, row)
    direction = Reflected(Isotropic(), lambda tensor: a, damping=0.1)
    found, z = drawn(direction, part), drawn(Isotropic(), part)
    assert found.equal(piece(drawn(direction, whole), places))
    assert not found.numel() or not found.equal(z)
    if found.numel() < ALIGN:
        assert direction.draw(PhiloxNoise(1).stream(9), part).equal(found)


@each_case
def test_the_factored_curvature_of_a_shard_is_that_of_the_whole_tensor(case):
    shape, places = CASES[case]
    ends = []
    for tensor in (named(torch.zeros(shape)), shard(case, torch.zeros(shape))):
        optimizer, stream = HiZOOL([("w", tensor.param)], smoothing=0.3), PhiloxNoise(1).stream(9)
        optimizer.zo_state = optimizer.init([tensor])
        for second in (1e-6, 3e-6):
            optimizer.absorb(tensor, stream, second)
        parts = [optimizer.inverse_root(tensor, a, b - a) for a, b in chunks(tensor.param)]
        root = torch.cat([*parts, torch.empty(0)]).view(tensor.param.shape)
        assert optimizer.inverse_root(tensor).equal(root)
        ends.append((root, optimizer.zo_state))
    (whole, state), (part, other) = ends
    assert part.equal(piece(whole, places))
    assert len(shape) == 1 or all(other[name].equal(values) for name, values in state.items())
    assert not part.equal(torch.ones_like(part)) or not part.numel()
