"""Noise on split weights in one pass against the passes of join, add and split, and against torch alone, bit for bit."""

from __future__ import annotations

import pytest
import torch

from metazo.kernels.splitfloat import join, plain_join, plain_split, split
from metazo.noise import TILE, cpu, cpu_split, philox

SEED, ID, ROUNDING = 0x7EDCBA9876543210, 0x123456789ABCDEF0, 0x13579BDF2468ACE0
each = pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
each_layout = pytest.mark.parametrize(
    ("high", "low"), [(h, w) for h in (torch.bfloat16, torch.float16) for w in (torch.int16, torch.int8)], ids=str
)


def weights(size: int, high: torch.dtype, low: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights of many magnitudes with nonzero bits below them, the first ones beyond the range of float16."""
    generator = torch.Generator().manual_seed(size)
    theta = torch.randn(size, generator=generator) * 10 ** (torch.rand(size, generator=generator) * 6 - 5)
    theta[:3] = torch.tensor([7e4, -1e6, 1e38])[:size]
    narrow, rest = torch.empty(size, dtype=high), torch.empty(size, dtype=low)
    split(theta, narrow, rest, 0, 1)
    return narrow, rest


def plain_place_(
    distribution: str,
    out: torch.Tensor,
    weights: torch.Tensor,
    low: torch.Tensor,
    alpha: float,
    seed: int,
    tensor_id: int,
    purpose: int,
    start: int,
) -> None:
    """cpu_split.place_ with torch alone, pass by pass."""
    z = philox.DISTRIBUTIONS[distribution](seed, tensor_id, purpose, start, start + len(weights), weights.device)
    out.copy_(plain_join(weights, low) + z * alpha)


def plain_add_(
    distribution: str,
    weights: torch.Tensor,
    low: torch.Tensor,
    alpha: float,
    beta: float,
    seed: int,
    tensor_id: int,
    purpose: int,
    start: int,
    rounding: int,
) -> None:
    """cpu_split.add_ with torch alone, pass by pass."""
    z = philox.DISTRIBUTIONS[distribution](seed, tensor_id, purpose, start, start + len(weights), weights.device)
    theta = plain_join(weights, low) * beta + z * alpha
    plain_split(theta, weights, low, start, rounding)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@each
@each_layout
@pytest.mark.parametrize(("size", "start"), [(0, 0), (1, 0), (257, TILE), (5003, 37 * TILE), (300_001, 0)])
def test_a_probe_is_placed_as_by_join_and_add(distribution, high, low, size, start, threads):
    w, rest = weights(size, high, low)
    kept = w.clone(), rest.clone()
    outs = [torch.full((size,), 7.0, dtype=high) for _ in range(3)]
    counter = (0.37, SEED, ID, 2, start)
    cpu_split.place_(distribution, outs[0], w, rest, *counter)
    plain_place_(distribution, outs[1], w, rest, *counter)
    theta = join(w, rest)
    cpu.add_(distribution, theta, 0.37, 1.0, SEED, ID, 2, start)
    outs[2].copy_(theta)
    assert all(torch.equal(outs[0].view(torch.int16), out.view(torch.int16)) for out in outs[1:])
    assert torch.equal(w, kept[0]) and torch.equal(rest, kept[1])
    assert size < 100 or not torch.equal(outs[0], w)


@each
@each_layout
@pytest.mark.parametrize(
    ("size", "start"), [(0, 0), (1, 0), (257, TILE), (5003, 37 * TILE), (300_001, 0), (2 * TILE + 3, (1 << 31) - TILE)]
)
@pytest.mark.parametrize(("alpha", "beta"), [(-1e-3, 1.0), (0.3, 0.7)])
def test_an_update_is_added_as_by_join_add_and_split(distribution, high, low, size, start, alpha, beta, threads):
    states = [weights(size, high, low) for _ in range(3)]
    before = join(*states[0])
    counter = (alpha, beta, SEED, ID, 1, start, ROUNDING)
    cpu_split.add_(distribution, *states[0], *counter)
    plain_add_(distribution, *states[1], *counter)
    theta = join(*states[2])
    cpu.add_(distribution, theta, alpha, beta, SEED, ID, 1, start)
    split(theta, *states[2], start, ROUNDING)
    for other in states[1:]:
        assert all(torch.equal(a.view(b.dtype), b) for a, b in zip(states[0], other))
    assert size < 100 or not torch.equal(join(*states[0]), before)


def test_what_is_not_finite_stays_so():
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0]).to(torch.bfloat16)
    out, rest = torch.empty_like(special), torch.zeros(5, dtype=torch.int16)
    cpu_split.place_("gaussian", out, special, rest, 0.0, SEED, ID, 0, 0)
    assert out[0].isnan() and torch.equal(out[1:], special[1:])


def test_what_is_supported():
    w, rest = weights(10, torch.bfloat16, torch.int16)
    assert cpu_split.supports(w, rest)
    assert not cpu_split.supports(w.float(), rest) and not cpu_split.supports(w, rest[::2])
