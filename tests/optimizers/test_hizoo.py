"""HiZOO's curvature against the true Hessian of a quadratic; HiZOO-L against HiZOO in cases that must agree."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from metazo.errors import UserError
from metazo.noise import PhiloxNoise
from metazo.optimizers import HiZOO, HiZOOL
from metazo.step.rules import Adam
from tests.optimizers.montecarlo import Linear, assert_mean, linear_estimates

HESSIAN = torch.tensor([[4.0, 1.0, 0.5], [1.0, 2.0, -0.5], [0.5, -0.5, 0.4]], dtype=torch.float64)


class Quadratic(nn.Module):
    """L = theta^T A theta / 2 with theta in the given shape, at its minimum."""

    def __init__(self, hessian: torch.Tensor = HESSIAN, *shape: int):
        super().__init__()
        self.hessian = hessian
        self.theta = nn.Parameter(torch.zeros(shape or (len(hessian),), dtype=torch.float64))

    def forward(self):
        flat = self.theta.flatten()
        return flat @ self.hessian @ flat / 2


def mean_growth(hessian: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    """E[k z_i^2] = (tr M + 2 M_ii) / 2, M = H^-1/2 A H^-1/2: fourth moments of a Gaussian (Isserlis)."""
    ratio = hessian.diagonal() / curvature
    return ratio.sum() / 2 + ratio


REST = (len(HESSIAN) + 2) / 2 * HESSIAN.diagonal()


@pytest.mark.parametrize("start", [torch.ones(3, dtype=torch.float64), REST], ids=["ones", "rest"])
def test_mean_increment_of_h(start):
    a, model, grown = 0.1, Quadratic(), []
    optimizer = HiZOO(model.named_parameters(), lr=0.0, smoothing=a)
    optimizer._prepare()
    for _ in range(800):
        optimizer.zo_state["H/theta"].copy_(start)
        optimizer.step(model)
        grown.append((optimizer.zo_state["H/theta"] / start - (1 - a)) / a)
    assert_mean(torch.stack(grown), mean_growth(HESSIAN, start))
    if start is REST:
        torch.testing.assert_close(mean_growth(HESSIAN, start), torch.ones(3, dtype=torch.float64))


def test_h_converges_to_the_true_diagonal_times_half_of_d_plus_two():
    """From H = 1: time average of ln H, whose standard error is about 0.08 here; the diagonal spans a factor of 10."""
    model, a, total = Quadratic(), 0.03, torch.zeros(3, dtype=torch.float64)
    optimizer = HiZOO(model.named_parameters(), lr=0.0, smoothing=a)
    for step in range(2500):
        optimizer.step(model)
        if step >= 600:
            total += optimizer.zo_state["H/theta"].log() / 1900
    assert (total - REST.log()).abs().max() < 0.25


@pytest.mark.parametrize("cls", [HiZOO, HiZOOL])
def test_curvature_enters_by_its_modulus(cls):
    ends = []
    for sign in (1, -1):
        model = Quadratic(sign * HESSIAN[:2, :2], 2, 1)
        optimizer = cls(model.named_parameters(), lr=0.0, smoothing=0.5, noise=PhiloxNoise(0))
        for _ in range(5):
            optimizer.step(model)
        ends.append(optimizer.inverse_root(optimizer.tensors[0]))
    torch.testing.assert_close(*ends)


def test_mean_of_the_estimate_is_the_gradient_over_h():
    model = Linear()
    optimizer = HiZOO(model.named_parameters(), lr=1.0, eps=1e-2, smoothing=0.0)
    optimizer._prepare()
    curvature = {name: torch.linspace(0.5, 3, p.numel()).view(p.shape).double() for name, p in model.named_parameters()}
    for name, value in curvature.items():
        optimizer.zo_state[f"H/{name}"].copy_(value)
    for name, found in linear_estimates(optimizer, model, 800).items():
        assert_mean(found, model.slopes[name] / curvature[name])


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_against_a_plain_twin(noise):
    """The probe along the old H, the update along the new one, biases exempt from decay."""
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    target = torch.randn(8, generator=generator, dtype=torch.float64)
    model = nn.ParameterDict({"w": torch.ones(2, 3), "bias": torch.ones(2)}).double()

    def loss(theta):
        return ((theta - target) @ root @ root.t() @ (theta - target)) / 2

    source, a, eps, lr, decay = PhiloxNoise(4, noise), 0.3, 1e-2, 0.01, 0.5
    optimizer = HiZOO(model.named_parameters(), lr=lr, eps=eps, smoothing=a, noise=source, weight_decay=decay)
    theta, h = torch.ones(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    exempt = torch.tensor([1.0] * 2 + [1 - lr * decay] * 6, dtype=torch.float64)  # bias comes first
    for step in range(6):
        optimizer.step(lambda: loss(torch.cat([model["bias"].flatten(), model["w"].flatten()])))
        named = {tensor.name: tensor for tensor in optimizer.tensors}
        stream = source.stream(source.seed(step))
        z = torch.cat([stream.draw(named["bias"]).flatten(), stream.draw(named["w"]).flatten()])
        d = z / h.sqrt()
        plus, minus, centre = loss(theta + eps * d), loss(theta - eps * d), loss(theta)
        h = (1 - a) * h + a * (plus + minus - 2 * centre).abs() / (2 * eps**2) * h * z**2
        theta = exempt * theta - lr * (plus - minus) / (2 * eps) * z / h.sqrt()
        seen = torch.cat([model["bias"].flatten(), model["w"].flatten()]).detach()
        torch.testing.assert_close(seen, theta, rtol=1e-8, atol=1e-8)
    assert optimizer.forwards == 3 * 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_published_setting_in_half_precision_is_mezo_and_ours_is_not(dtype):
    moved = {}
    for compat in ("paper", "official"):
        model = Linear(dtype)
        optimizer = HiZOO(model.named_parameters(), smoothing=1e-8, compat=compat)
        for _ in range(20):
            optimizer.step(lambda: model() + sum((p.double() ** 2).sum() for p in model.parameters()))
        curvature = optimizer.zo_state["H/weight"]
        assert curvature.dtype == (torch.float32 if compat == "paper" else dtype)
        moved[compat] = float((curvature.double() - 1).abs().max())
    assert moved["official"] == 0 and moved["paper"] > 0


def pair(hessian, shape, **settings):
    """HiZOO and HiZOO-L on one problem with the same noise."""
    made = []
    for cls in (HiZOO, HiZOOL):
        model = Quadratic(hessian, *shape)
        made.append((cls(model.named_parameters(), lr=0.01, noise=PhiloxNoise(3, **settings)), model))
        made[-1][0].smoothing = 0.2
        made[-1][0]._prepare()
    return made


def random_hessian(size: int) -> torch.Tensor:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return root @ root.t()


def test_one_step_from_rank_one_gives_the_means_of_the_dense_h():
    (dense, first), (factored, second) = pair(random_hessian(12), (4, 3))
    rows, columns = torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([0.5, 1, 6]).double()
    dense.zo_state["H/theta"].copy_(torch.outer(rows, columns) / 2.5)
    factored.zo_state["R/theta"].copy_(rows)
    factored.zo_state["C/theta"].copy_(columns)  # both have mean 2.5, as in the method
    dense.step(first)
    factored.step(second)
    torch.testing.assert_close(factored.zo_state["R/theta"], dense.zo_state["H/theta"].mean(1))
    torch.testing.assert_close(factored.zo_state["C/theta"], dense.zo_state["H/theta"].mean(0))
    assert not torch.equal(first.theta, second.theta), "the new H is not of rank one"


@pytest.mark.parametrize(
    ("shape", "noise"), [((1, 6), "gaussian"), ((6, 1), "gaussian"), ((6,), "gaussian"), ((3, 1, 2), "rademacher")]
)
def test_factored_is_dense_where_h_stays_of_rank_one(shape, noise):
    (dense, first), (factored, second) = pair(random_hessian(6), shape, distribution=noise)
    for model in (first, second):
        model.theta.data.fill_(1.0)
    for _ in range(12):
        dense.step(first)
        factored.step(second)
        torch.testing.assert_close(first.theta, second.theta, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(factored.inverse_root(factored.tensors[0]), torch.ones(shape, dtype=torch.float64))


def test_mean_increments_of_rows_and_columns():
    a, hessian = 0.1, random_hessian(6)
    model = Quadratic(hessian, 2, 3)
    optimizer = HiZOOL(model.named_parameters(), lr=0.0, smoothing=a)
    optimizer._prepare()
    state, found = optimizer.zo_state, []
    rows, columns = torch.tensor([1.0, 3]).double(), torch.tensor([0.5, 1.5, 4]).double()
    for _ in range(800):
        state["R/theta"].copy_(rows)
        state["C/theta"].copy_(columns)
        optimizer.step(model)
        found.append(torch.cat([state["R/theta"] - (1 - a) * rows, state["C/theta"] - (1 - a) * columns]) / a)
    whole = torch.outer(rows, columns) / 2
    grown = whole * mean_growth(hessian, whole.flatten()).view(2, 3)
    assert_mean(torch.stack(found), torch.cat([grown.mean(1), grown.mean(0)]))


def test_factored_memory_is_under_a_tenth():
    model = nn.ModuleDict({"embed": nn.Embedding(300, 64), "fc": nn.Linear(64, 256), "norm": nn.LayerNorm(64)})
    numbers = {}
    for cls in (HiZOO, HiZOOL):
        optimizer = cls(model.named_parameters())
        optimizer.step(lambda: model["fc"].weight.square().sum())
        numbers[cls] = sum(value.numel() for value in optimizer.zo_state.values())
    weights = sum(p.numel() for p in model.parameters())
    assert numbers[HiZOO] == weights
    assert numbers[HiZOOL] < 0.1 * weights


@pytest.mark.parametrize("cls", [HiZOO, HiZOOL])
@pytest.mark.parametrize("rule", [None, Adam()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_in_mid_run_is_bit_identical(cls, rule, dtype):
    def make(model):
        return cls(model.named_parameters(), lr=0.05, smoothing=0.1, rule=rule, scale="rms", weight_decay=0.1)

    model = Linear(dtype)
    optimizer = make(model)
    for step in range(7):
        if step == 4:
            twin = copy.deepcopy(model)
            other = make(twin)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step(lambda: model() ** 2)
        if step >= 4:
            other.step(lambda: twin() ** 2)
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_a_single_number_has_a_whole_curvature_in_compensated_precision():
    found = []
    for cls in (HiZOO, HiZOOL):
        number = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))
        optimizer = cls([("number", number)], lr=0.05, smoothing=0.1, precision="compensated-16")
        for _ in range(3):
            optimizer.step(lambda number=number: number.float() ** 4)
        found.append((number.item(), optimizer.zo_state["H/number"].item()))
    assert found[0] == found[1] and found[0][0] < 0.5 and found[0][1] != 1


@pytest.mark.parametrize("cls", [HiZOO, HiZOOL])
@pytest.mark.parametrize("smoothing", [-1e-8, 1.0, math.nan])
def test_bad_smoothing(cls, smoothing):
    with pytest.raises(UserError, match="smoothing"):
        cls(Linear().named_parameters(), smoothing=smoothing)


def test_bad_compat():
    with pytest.raises(UserError, match="compat"):
        HiZOO(Linear().named_parameters(), compat="both")  # type: ignore[arg-type]
