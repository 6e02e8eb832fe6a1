"""Draws that were announced are made together, with the numbers of draws alone, and never more than a few at once."""

from __future__ import annotations

import math

import pytest
import torch

from metazo.blocks import NamedTensor, tensor_id
from metazo.noise import DENSE, LEFT, RIGHT, PhiloxNoise, ahead

SHAPES = ((3, 5), (7,), (2049,), (1, 1), (0,), (64, 33), (2, 3, 4))


def tensors(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[NamedTensor]:
    named = [(f"w{k}", torch.nn.Parameter(torch.zeros(shape, dtype=dtype))) for k, shape in enumerate(shapes)]
    return [NamedTensor(name, param, tensor_id(name)) for name, param in named]


def pair(distribution: str = "gaussian", backend: str = "auto"):
    return [PhiloxNoise(5, distribution, backend).stream(77) for _ in range(2)]


@pytest.fixture
def calls(monkeypatch):
    """Draws made by each call of the kernels."""
    from metazo.noise import stream

    made: list[int] = []
    plain = stream.PhiloxStream.add_all_
    monkeypatch.setattr(
        stream.PhiloxStream, "add_all_", lambda s, moves, *a: made.append(len(moves)) or plain(s, moves, *a)
    )
    return made


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
def test_the_numbers_are_those_of_draws_alone(distribution, dtype, calls):
    alone, together = pair(distribution)
    draws = [(tensor, None, DENSE) for tensor in tensors()] + [(t, (4, 2), LEFT) for t in tensors()[:2]]
    together.prepare(draws)
    for tensor, shape, purpose in draws:
        wanted, found = (stream.draw(tensor, shape, purpose, dtype) for stream in (alone, together))
        assert found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(found, wanted)
        assert found.data_ptr() % ahead.ALIGN_BYTES == 0 or not found.numel()
        found.fill_(math.nan)  # it belongs to the caller: no other draw sees that
    assert sorted(calls) == [2, len(SHAPES)]  # the two purposes; no draw was made alone
    # drawn again, it is not what was given away
    assert torch.equal(together.draw(draws[0][0]), alone.draw(draws[0][0]))


def test_any_order_part_and_type_gives_the_numbers_too(calls):
    alone, together = pair()
    some = tensors()
    together.prepare((tensor, None, DENSE) for tensor in some)
    for k in (3, 1, 1, 0, 6, 5, 2):
        assert torch.equal(together.draw(some[k]), alone.draw(some[k]))
    together.prepare((tensor, None, DENSE) for tensor in some)
    assert torch.equal(together.draw(some[2], start=2048, count=1), alone.draw(some[2], start=2048, count=1))
    assert torch.equal(together.draw(some[5], count=40), alone.draw(some[5], count=40))  # not all of what was made
    assert torch.equal(together.draw(some[0], dtype=torch.float64), alone.draw(some[0], dtype=torch.float64))
    assert torch.equal(together.draw(some[1]), alone.draw(some[1]))  # a type other than that of its group
    assert torch.equal(together.draw(some[4], (3, 3), RIGHT), alone.draw(some[4], (3, 3), RIGHT))  # not announced
    assert calls


def test_groups_are_small_and_a_large_tensor_is_drawn_alone(monkeypatch, calls):
    monkeypatch.setattr(ahead, "ENTRIES", 2048)
    alone, together = pair()
    some = tensors(shapes=((1000,), (1000,), (1000,), (3000,), (5,), (6,)))
    together.prepare((tensor, None, DENSE) for tensor in some)
    for tensor in some:
        assert torch.equal(together.draw(tensor), alone.draw(tensor))
    assert calls == [2, 2]  # the third has a group to itself, and is drawn alone like the fourth


def test_the_plain_backend_draws_one_by_one(calls):
    alone, together = pair(backend="torch")
    together.prepare((tensor, None, DENSE) for tensor in tensors())
    assert all(torch.equal(together.draw(tensor), alone.draw(tensor)) for tensor in tensors()) and not calls


@pytest.mark.parametrize("name", ["loren", "hizoo", "hizoo-l", "zo-muon", "lozo", "eggroll"])
def test_no_draw_of_a_step_is_made_alone(name, monkeypatch):
    from metazo.noise import stream
    from metazo.optimizers import OPTIMIZERS, registry

    registry.load()
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(10)))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    optimizer = OPTIMIZERS[name](model.named_parameters(), lr=1e-3)
    optimizer.step(lambda: model(x).square().mean())
    alone: list[str] = []
    plain = stream.PhiloxStream.add_
    monkeypatch.setattr(stream.PhiloxStream, "add_", lambda s, t, *a, **k: alone.append(t.name) or plain(s, t, *a, **k))
    optimizer.step(lambda: model(x).square().mean())
    assert not alone
