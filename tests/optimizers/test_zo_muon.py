"""ZO-Muon: the orthonormal basis, msign by both methods, the mean of the subspace estimate, steps against a reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metazo.errors import UserError
from metazo.noise import LEFT, RIGHT, TorchOrderNoise
from metazo.optimizers import ZOMuon
from metazo.optimizers.zo_muon import exact_sign, haar_basis, newton_schulz
from tests.optimizers.montecarlo import Linear, assert_mean


def polar(g: np.ndarray) -> np.ndarray:
    """msign by the inverse root of g g^T, independent of a decomposition of g."""
    values, vectors = np.linalg.eigh(g @ g.T)
    return vectors @ np.diag(values**-0.5) @ vectors.T @ g


def test_the_basis_is_orthonormal_and_haar():
    generator = torch.Generator().manual_seed(0)
    gaussians = torch.randn(2000, 5, 2, generator=generator, dtype=torch.float64)
    bases = torch.stack([haar_basis(g) for g in gaussians])
    torch.testing.assert_close(bases.mT @ bases, torch.eye(2, dtype=torch.float64).expand(2000, 2, 2))
    for g, p in zip(gaussians[:5], bases[:5]):
        torch.testing.assert_close(p @ (p.t() @ g), g)  # the same span
    projections = bases @ bases.mT  # E[P P^T] = (r / m) I, and no direction of a column is preferred
    assert_mean(projections.flatten(1)[:, ::6], torch.full((5,), 2 / 5, dtype=torch.float64))
    assert float(bases.mean(0).abs().max()) < 5 * (1 / 5 / 2000) ** 0.5


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (4, 4)])
def test_msign(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = polar(g.numpy()) if shape[0] <= shape[1] else polar(g.t().numpy()).T
    torch.testing.assert_close(exact_sign(g), torch.from_numpy(wanted), rtol=1e-9, atol=1e-9)
    about = newton_schulz(g)
    singular = torch.linalg.svdvals(about)
    assert float(singular.min()) > 0.6 and float(singular.max()) < 1.25
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    inside = u.t() @ about @ v.t()  # the same singular vectors
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-9)
    values = np.linalg.svd(g.numpy(), compute_uv=False) / np.linalg.norm(g.numpy())
    for _ in range(5):  # the quintic of Muon, on each singular value alone
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    np.testing.assert_allclose(inside.diagonal().numpy(), values, rtol=1e-9)
    assert not newton_schulz(torch.zeros(shape)).any() and not exact_sign(torch.zeros(shape)).any()


def test_an_estimate_of_rank_one_stays_of_rank_one():
    g = torch.outer(torch.arange(1.0, 4.0), torch.arange(1.0, 6.0)).double()
    torch.testing.assert_close(exact_sign(g), g / g.norm())


@pytest.mark.parametrize("msign", ["newton-schulz", "svd"])
@pytest.mark.parametrize("queries", [1, 4])
def test_steps_against_a_reference(msign, queries):
    model, lr, eps, rate = Linear(), 0.05, 1e-2, 0.3
    optimizer = ZOMuon(
        model.named_parameters(), lr, eps, rank=2, interval=3, queries=queries, msign=msign, vector_rate=rate,
        weight_decay=0.1,
    )  # fmt: skip
    optimizer._prepare()
    weight, bias = optimizer.tensors
    w, b = weight.param.detach().clone(), bias.param.detach().clone()
    for step in range(7):
        optimizer.step(model)
        streams = [optimizer.noise.stream(seed) for seed in optimizer.last_step.seeds]
        if step % 3 == 0:
            q, r = np.linalg.qr(streams[0].draw(weight, (2, 2), LEFT).numpy())
            p = torch.from_numpy(q * np.sign(np.diag(r)))
        psi = [stream.draw(weight, (3, 2), RIGHT).t() for stream in streams]
        z = [stream.draw(bias) for stream in streams]
        c = [float((model.slopes["weight"] * (p @ a)).sum() + (model.slopes["bias"] * d).sum()) for a, d in zip(psi, z)]
        g = sum(ck * a for ck, a in zip(c, psi)) / queries
        sign = newton_schulz(g) if msign == "newton-schulz" else torch.from_numpy(_sign(g.numpy()))
        w = w * (1 - lr * 0.1) - lr * p @ sign
        b = b - rate * lr * sum(ck * d for ck, d in zip(c, z)) / queries
        torch.testing.assert_close(weight.param.data, w, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(bias.param.data, b, rtol=1e-6, atol=1e-8)


def _sign(g: np.ndarray) -> np.ndarray:
    u, s, v = np.linalg.svd(g, full_matrices=False)
    rank = int((s > 1e-10 * s[0]).sum())
    return u[:, :rank] @ v[:rank]


def test_the_subspace_estimate_is_the_projected_gradient_in_the_mean(monkeypatch):
    """Without msign, E[P g] = P P^T grad, and over new P it is (r / m) grad."""
    model = Linear()
    optimizer = ZOMuon(model.named_parameters(), lr=1.0, eps=1e-2, rank=1, interval=1, queries=2, vector_rate=1.0)
    optimizer.sign = lambda g: g
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    moves: dict[str, list[torch.Tensor]] = {name: [] for name in start}
    for _ in range(800):
        optimizer.step(model)
        for name, p in model.named_parameters():
            moves[name].append(start[name] - p.data)
            p.data.copy_(start[name])
    assert_mean(torch.stack(moves["weight"]), model.slopes["weight"] / 2)
    assert_mean(torch.stack(moves["bias"]), model.slopes["bias"])


def test_the_published_order_of_noise():
    """P, then Psi, tensor by tensor from one generator, as in the published code at a step with a new P."""
    model = Linear()
    optimizer = ZOMuon(
        model.named_parameters(), 0.0, 1e-2, rank=2, queries=1, noise=TorchOrderNoise(0, seeds=[7]), check_loss=False
    )
    seen = []
    optimizer.step(lambda: [seen.append([p.detach().clone() for p in model.parameters()]), model()][1])
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 2), (3, 2), (2,))]
    moved = [(after - before) / 1e-2 for before, after in zip(*seen)]
    torch.testing.assert_close(moved[0], haar_basis(drawn[0]) @ drawn[1].t(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved[1], drawn[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"rank": 0}, "rank"),
        ({"interval": 0}, "interval"),
        ({"msign": "x"}, "msign"),
        ({"vector_rate": -1.0}, "vector"),
    ],
)
def test_bad_hyperparameters(own, words):
    with pytest.raises(UserError, match=words):
        ZOMuon(Linear().named_parameters(), **own)
