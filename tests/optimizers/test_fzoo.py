"""FZOO's update against a second implementation, and the properties of its normalisation."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from metazo.blocks import named_tensors
from metazo.errors import UserError
from metazo.optimizers.fzoo import FZOO

G = torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=torch.float64)


def weights() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("compat", ["paper", "official"])
def test_update_written_out(compat):
    p = weights()
    optimizer = FZOO([("w", p)], lr=0.1, eps=0.01, queries=5, seed=3, compat=compat)
    optimizer.step(lambda: (p * G).sum() + p.square().sum() + 2.0)
    step, (tensor,) = optimizer.last_step, named_tensors([("w", p)])
    assert step is not None and optimizer.forwards == 6
    signs = [optimizer.noise.stream(s).draw(tensor) for s in step.seeds]
    assert all(set(u.flatten().tolist()) <= {-1.0, 1.0} for u in signs)
    losses = [float((0.01 * u * G).sum() + (0.01 * u).square().sum() + 2.0) for u in signs]
    if compat == "paper":
        factor = 1 / (0.01 * 5 * statistics.stdev(losses))
    else:
        factor = 1 / (5 * statistics.pstdev(losses))
    expected = sum(-0.1 * factor * (f - 2.0) * u for f, u in zip(losses, signs))
    torch.testing.assert_close(p.data, expected, rtol=1e-8, atol=1e-12)


def test_length_of_a_step_does_not_depend_on_the_slope():
    moved = []
    for slope in (1.0, 1000.0):
        p = weights()
        FZOO([("w", p)], lr=1e-4, eps=1e-3, seed=1).step(lambda: slope * (p * G).sum())
        moved.append(p.data.clone())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-7, atol=0)


def test_estimate_points_along_the_gradient():
    """Before normalisation E g = gradient exactly on a linear loss; after, the mean direction is the gradient's."""
    total = torch.zeros_like(G)
    for seed in range(400):
        p = weights()
        FZOO([("w", p)], lr=1e-3, eps=1e-3, seed=seed).step(lambda: (p * G).sum())
        total -= p.data
    assert float((total * G).sum() / total.norm() / G.norm()) > 0.98


def test_equal_losses_move_nothing():
    p = weights()
    loss = FZOO([("w", p)], lr=1.0).step(lambda: torch.tensor(3.0))
    assert loss == 3.0 and not p.data.any()


@pytest.mark.parametrize(
    "bad, word", [({"queries": 1}, "queries"), ({"eps": math.nan}, "eps"), ({"compat": "x"}, "comp")]
)
def test_bad_hyperparameters(bad, word):
    with pytest.raises(UserError, match=word):
        FZOO([("w", weights())], **bad)


def test_rank_one_signs_are_signs_and_have_the_identity_as_covariance():
    """E[d d^T] = I, to 4 standard errors of the Monte Carlo mean (each product of two entries has variance 1)."""
    p = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = FZOO([("w", p)], rank=1, seed=5)
    optimizer._prepare()
    direction, (tensor,) = optimizer.propose(optimizer.zo_state, 0, []), optimizer.tensors
    draws = torch.stack([direction.draw(optimizer.noise.stream(seed), tensor).flatten() for seed in range(4000)])
    assert set(draws.flatten().tolist()) == {-1.0, 1.0}
    assert all(torch.linalg.matrix_rank(d.view(3, 4)) == 1 for d in draws[:20])
    covariance = draws.T @ draws / len(draws)
    assert (covariance - torch.eye(12, dtype=torch.float64)).abs().max() < 4 / math.sqrt(len(draws))


@pytest.mark.parametrize("rank", [1, 2])
def test_together_and_in_turn_take_the_same_steps(rank):
    torch.manual_seed(1)
    nets = [torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double() for _ in "ab"]
    nets[1].load_state_dict(nets[0].state_dict())
    x, y = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    for net, probing in zip(nets, ("together", "in-turn")):
        optimizer = FZOO(net.named_parameters(), lr=1e-6, queries=4, rank=rank, probing=probing, seed=2)
        for _ in range(3):
            optimizer.step(lambda net=net: (net(x) - y).square().mean())
        assert optimizer.forwards == 15
        assert ("probing" in optimizer.zo_state) == (probing == "together")
    for (name, a), b in zip(nets[0].named_parameters(), nets[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13, msg=name)


def test_dense_directions_are_evaluated_in_turn():
    p = weights()
    assert FZOO([("w", p)]).probing == "in-turn"
    with pytest.raises(UserError, match="fzoo has dense noise"):
        FZOO([("w", p)], probing="together")
    for rank in (-1, 1.5):
        with pytest.raises(UserError, match="`rank` must be a whole number"):
            FZOO([("w", p)], rank=rank)
