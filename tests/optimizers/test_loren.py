"""LOREN's mathematics against independent forms: matrices, autograd, Monte Carlo, and a problem on which it must learn."""

from __future__ import annotations

import math

import pytest
import torch

from metazo.blocks import ALIGN, chunks, named_tensors
from metazo.errors import UserError
from metazo.noise import PhiloxNoise
from metazo.optimizers.loren import LOREN, score
from metazo.step.directions import Isotropic, Reflected
from metazo.step.estimators import LeaveOneOut
from tests.optimizers.montecarlo import Linear, linear_estimates

RHO = 0.3


def parameter(*shape: int, dtype=torch.float64, value: float = 0.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full(shape, value, dtype=dtype))


def reflected_matrix(a: torch.Tensor) -> torch.Tensor:
    """B as a matrix, from the direction's action on each unit vector."""

    class Given:
        def draw(self, stream, tensor, dtype=None, start=0, count=None):
            return torch.eye(len(a), dtype=torch.float64)

    (tensor,) = named_tensors([("w", parameter(len(a), len(a)))])
    return Reflected(Given(), lambda _: a, RHO).draw(None, tensor).t()  # type: ignore[arg-type]


def test_square_root():
    a = torch.linspace(-1, 2, 6, dtype=torch.float64)
    b = reflected_matrix(a)
    h = RHO * torch.eye(6, dtype=torch.float64) + torch.outer(a, a)
    torch.testing.assert_close(b @ b.t(), RHO * torch.linalg.inv(h), rtol=1e-12, atol=1e-14)
    # the reflected root reverses a, and a zero vector changes nothing
    torch.testing.assert_close(b @ a, -math.sqrt(RHO / (RHO + float(a @ a))) * a, rtol=1e-12, atol=0)
    torch.testing.assert_close(reflected_matrix(torch.zeros(6, dtype=torch.float64)), torch.eye(6, dtype=torch.float64))


def test_add_is_draw():
    (tensor,) = named_tensors([("w", parameter(5, 4))])
    a, stream = torch.randn(4, dtype=torch.float64), PhiloxNoise(3).stream(11)
    direction = Reflected(Isotropic(), lambda _: a, RHO)
    out = torch.randn(5, 4, dtype=torch.float64)
    expected = 0.5 * out - 2 * direction.draw(stream, tensor, torch.float64)
    direction.add_(stream, tensor, out, -2.0, 0.5)
    torch.testing.assert_close(out, expected)


def test_score_is_the_gradient_of_the_log_density():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    d = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    covariance = RHO * torch.linalg.inv(RHO * torch.eye(5, dtype=torch.float64) + torch.outer(a, a))
    density = torch.distributions.MultivariateNormal(torch.zeros(5, dtype=torch.float64), covariance)
    (expected,) = torch.autograd.grad(density.log_prob(d).sum(), a)
    torch.testing.assert_close(score(d, a.detach(), RHO), expected, rtol=1e-11, atol=1e-12)


def test_leave_one_out_is_unbiased():
    """On a linear loss E g = rho H^-1 grad: 1,000 steps of K = 6, within five (small) standard errors."""
    gradient = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)

    class Above(Linear):
        def forward(self):
            return super().forward() + 7.0

    model = Above()
    model.slopes, model.weight, model.bias = {"weight": gradient}, parameter(4), None  # type: ignore[assignment]
    optimizer = LOREN(
        [("weight", model.weight)], lr=1.0, eps=1e-2, queries=6, damping=RHO, lr_cov=0, momentum=0, seed=1
    )
    found = linear_estimates(optimizer, model, 1000)["weight"]
    a = optimizer.zo_state["a/weight"]
    expected = RHO * torch.linalg.inv(RHO * torch.eye(4, dtype=torch.float64) + torch.outer(a, a)) @ gradient
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - expected).abs() < 5 * error).all()
    assert error.norm() < 0.1 * expected.norm()


def test_coefficients_leave_the_query_out():
    losses, eps = [1.0, 4.0, 2.5, -1.0], 0.1
    found = LeaveOneOut(4).coefficients(losses, eps)
    for k, c in enumerate(found):
        others = [f for j, f in enumerate(losses) if j != k]
        assert c == pytest.approx((losses[k] - sum(others) / 3) / eps / 4)


def aligned(steps: int, lr_cov: float, seed: int) -> tuple[float, float]:
    """|cos| between a and the stiff input direction before and after learning, at a minimum (no slope, no noise)."""
    n, m = 8, 4
    stiff = torch.zeros(n, dtype=torch.float64)
    stiff[2] = 1.0
    p = parameter(m, n)
    optimizer = LOREN([("w", p)], lr=0.0, eps=0.1, queries=12, damping=1.0, lr_cov=lr_cov, seed=seed)

    def cosine() -> float:
        a = optimizer.tensors_state()["a/w"]
        return float((a @ stiff).abs() / a.norm())

    before = cosine()
    for _ in range(steps):
        optimizer.step(lambda: 0.5 * p.square().sum() + 50 * (p @ stiff).square().sum())
    return before, cosine()


def test_a_learns_the_stiff_direction():
    for seed in (0, 5):  # measured: 0.36 to 0.985 and 0.16 to 0.974
        before, after = aligned(200, 0.2, seed)
        assert before < 0.4 and after > 0.95, (before, after)
    assert aligned(5, 0.0, 5)[1] == before  # at learning rate 0 of a nothing changes


def test_momentum_is_torch_s_once_a_batch():
    g = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    plain, heavy = parameter(3), parameter(3)
    kept = dict(lr=0.1, eps=1e-3, lr_cov=0, seed=2)
    one = LOREN([("w", plain)], momentum=0, **kept)  # type: ignore[arg-type]
    two = LOREN([("w", heavy)], momentum=0.7, **kept)  # type: ignore[arg-type]
    buffer, theta = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(5):
        before = plain.data.clone()
        one.step(lambda: plain @ g)
        two.step(lambda: heavy @ g)
        buffer = 0.7 * buffer + (before - plain.data) / 0.1
        theta = theta - 0.1 * buffer
    torch.testing.assert_close(heavy.data, theta, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("compat", ["paper", "official"])
def test_a_kernel_is_the_matrix_of_its_rows(compat):
    found = []
    for shape in ((2, 9), (2, 1, 3, 3)):
        weight = parameter(*shape, value=0.1)
        optimizer = LOREN([("w", weight)], lr=1e-3, eps=0.1, lr_cov=0.1, compat=compat)
        for _ in range(3):
            optimizer.step(lambda weight=weight: weight.exp().sum())
        found.append((weight.data.view(-1), optimizer.zo_state["a/w"]))
    assert all(map(torch.equal, *found)) and not found[0][0].equal(torch.full((18,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("compat", ["paper", "official"])
def test_a_number_without_dimensions_is_a_row_of_one_entry(compat):
    found = []
    for shape in ((), (1,)):
        weight = torch.nn.Parameter(torch.full(shape, 0.1, dtype=torch.float64))
        optimizer = LOREN([("w", weight)], lr=1e-3, eps=0.1, lr_cov=0.1, compat=compat)
        for _ in range(3):
            optimizer.step(lambda weight=weight: weight.exp().sum())
        found.append((weight.data.view(-1), optimizer.zo_state["a/w"]))
    assert all(map(torch.equal, *found)) and found[0][0].item() != 0.1


@pytest.mark.parametrize(
    "bad, word",
    [({"queries": 1}, "queries"), ({"damping": 0}, "damping"), ({"damping": math.nan}, "damping"),
     ({"lr_cov": math.nan}, "lr_cov"), ({"momentum": 1.0}, "momentum"), ({"eps": 0}, "eps"),
     ({"lr": math.nan}, "lr"), ({"compat": "x"}, "compat")],
)  # fmt: skip
def test_bad_hyperparameters(bad, word):
    with pytest.raises(UserError, match=word):
        LOREN([("w", parameter(3))], **bad)


def test_a_row_of_several_chunks_is_drawn_once_for_its_product(monkeypatch):
    """The chunks are those of the whole row, and their number of draws grows with the row, not with its square."""
    monkeypatch.setattr("metazo.blocks.CHUNK", ALIGN)
    (tensor,) = named_tensors([("w", torch.nn.Parameter(torch.zeros(6 * ALIGN)))])
    a, stream, drawn = torch.linspace(-1, 1, 6 * ALIGN), PhiloxNoise(0).stream(3), []

    class Counted(Isotropic):
        def draw(self, *given):
            drawn.append(1)
            return super().draw(*given)

    whole = Reflected(Isotropic(), lambda _: a, 0.1).draw(stream, tensor)
    direction = Reflected(Counted(), lambda _: a, 0.1)
    for _ in range(2):  # a later pass takes a as it is then
        ranges = list(chunks(tensor.param))
        parts = [direction.draw(stream, tensor, None, start, stop - start) for start, stop in ranges]
        torch.testing.assert_close(torch.cat(parts), Reflected(Isotropic(), lambda _: a, 0.1).draw(stream, tensor))
        assert len(ranges) > 5 and len(drawn) == 2 * len(ranges)
        drawn.clear()
        a.neg_().mul_(3)
    assert not torch.equal(whole, torch.cat(parts))
