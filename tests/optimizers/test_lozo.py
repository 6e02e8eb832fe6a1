"""LOZO and LOZO-M: unbiased up to the factor r, updates along the probed directions, momentum against plain code."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from metazo.errors import UserError
from metazo.noise import LEFT, RIGHT, PhiloxNoise, TorchOrderNoise
from metazo.optimizers import LOZO, LOZOM
from metazo.optimizers.registry import OFFICIAL, official
from metazo.step.rules import Adam, Momentum
from tests.optimizers.montecarlo import Linear, assert_mean, linear_estimates


class Probed:
    """A closure that stores the weights at which it was called."""

    def __init__(self, model: nn.Module):
        self.model, self.seen = model, []

    def __call__(self):
        self.seen.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return self.model()


def cosine(a, b) -> float:
    return float(((a * b).sum() / (a.norm() * b.norm())).detach())


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("queries", [1, 3])
def test_mean_is_rank_times_the_gradient(noise, rank, queries):
    model = Linear()
    optimizer = LOZO(model.named_parameters(), lr=1.0, eps=1e-2, rank=rank, interval=1, noise=noise, queries=queries)
    found = linear_estimates(optimizer, model, 800 if queries == 1 else 400)
    assert_mean(found["weight"], rank * model.slopes["weight"])
    assert_mean(found["bias"], model.slopes["bias"])


def test_mean_within_an_interval_is_in_the_subspace_of_v():
    model = Linear()
    optimizer = LOZO(model.named_parameters(), lr=1.0, eps=1e-2, interval=10**6)
    found = linear_estimates(optimizer, model, 800)["weight"]
    v = optimizer.tensors_state()["V/weight"]
    assert_mean(found, model.slopes["weight"] @ v @ v.t())


def test_block_scales_enter_squared():
    model = Linear()
    optimizer = LOZO(model.named_parameters(), lr=1.0, eps=1e-2, interval=1, scale="rms", seed=5)
    optimizer.step(model)
    sigma = optimizer.scale.scales(optimizer.zo_state, 0, optimizer.weights.read)
    found = linear_estimates(optimizer, model, 1600)
    for name, factor in (("weight", 2.0), ("bias", 1.0)):
        assert_mean(found[name], factor * sigma[name] ** 2 * model.slopes[name])


@pytest.mark.parametrize("noise", ["gaussian", "rademacher", "published"])
@pytest.mark.parametrize("scale", [None, "rms"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_update_goes_along_the_probe_at_every_step(noise, scale, dtype, rtol):
    model = Linear(dtype)
    source = TorchOrderNoise(3) if noise == "published" else noise
    optimizer = LOZO(model.named_parameters(), lr=0.1, eps=0.1, interval=2, noise=source, scale=scale, check_loss=False)
    for _ in range(5):
        closure, start = Probed(model), copy.deepcopy(dict(model.named_parameters()))
        optimizer.step(closure)
        c = optimizer.last_step.coefficients[0]
        for name, parameter in model.named_parameters():
            d = (closure.seen[0][name] - closure.seen[1][name]) / 0.2
            torch.testing.assert_close(parameter.data, start[name] - 0.1 * c * d, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("cls", [LOZO, LOZOM])
@pytest.mark.parametrize("noise", ["gaussian", "published"])
def test_official_updates_along_noise_never_probed_where_v_is_new(cls, noise):
    model = nn.Linear(40, 30).double()
    g = torch.randn(30, 40, dtype=torch.float64)
    model.forward = lambda: (g * model.weight).sum()  # type: ignore[method-assign]
    source = TorchOrderNoise(3) if noise == "published" else noise
    kind = {"momentum": 0.0} if cls is LOZOM else {}
    optimizer = cls(
        model.named_parameters(), lr=1e-3, interval=3, compat="official", noise=source, check_loss=False, **kind
    )
    for step in range(9):
        closure, start = Probed(model), model.weight.detach().clone()
        optimizer.step(closure)
        along = cosine(model.weight - start, closure.seen[0]["weight"] - closure.seen[1]["weight"])
        assert abs(along) < 0.5 if step % 3 == 0 else abs(along) > 0.999


@pytest.mark.parametrize("cls", [LOZO, LOZOM])
def test_interval_one_learns_only_in_the_correct_mode(cls):
    falls = {}
    for compat in ("paper", "official"):
        model = Linear()
        start = model().item()
        optimizer = cls(model.named_parameters(), lr=1e-3, interval=1, compat=compat)
        for _ in range(300):
            optimizer.step(model)
        falls[compat] = start - model().item()
    square = sum(float((slope**2).sum()) for slope in Linear().slopes.values())
    # with plain descent the loss would fall by `square` per unit of lr; a new V per step keeps r / n of LOZO-M's momentum
    assert falls["paper"] > 0.25 * 300 * 1e-3 * square
    assert abs(falls["official"]) < 0.5 * falls["paper"]


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_momentum_against_a_plain_twin(interval, noise, queries):
    model, beta, lr = Linear(), 0.8, 0.05
    source = PhiloxNoise(7, noise)
    optimizer = LOZOM(model.named_parameters(), lr=lr, interval=interval, momentum=beta, noise=source, queries=queries)
    optimizer._prepare()
    weight, bias = optimizer.tensors
    w, b = weight.param.detach().clone(), bias.param.detach().clone()
    for step in range(8):
        optimizer.step(model)
        streams = [source.stream(source.seed(step, query)) for query in range(queries)]
        terms = [*zip(optimizer.last_step.coefficients, streams, strict=True)]
        u = sum(c * stream.draw(weight, (2, 2), LEFT) for c, stream in terms)
        z = sum(c * stream.draw(bias) for c, stream in terms)
        if step % interval == 0:
            old, v = (None if step == 0 else v), streams[0].draw(weight, (3, 2), RIGHT)  # noqa: F821
            if old is not None:
                factor = factor @ old.t() @ v / 3  # noqa: F821
        if step == 0:
            factor, m = u, z
        else:
            factor, m = beta * factor + (1 - beta) * u, beta * m + (1 - beta) * z
        w, b = w - lr * factor @ v.t(), b - lr * m
        torch.testing.assert_close(weight.param.data, w, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(bias.param.data, b, rtol=1e-9, atol=1e-9)


def test_projection_is_the_least_squares_fit_with_the_mean_of_vtv():
    """N' = N_ls (V^T V) / n with N_ls from numpy's lstsq; and E[N' V^T] = (r / n) N V_old^T over new V."""
    tensor_shape, r = (6, 50), 2
    model = nn.Linear(50, 6, bias=False).double()
    optimizer = LOZOM(model.named_parameters(), rank=r, noise=PhiloxNoise(1))
    optimizer._prepare()
    (tensor,), state = optimizer.tensors, optimizer.zo_state
    generator = torch.Generator().manual_seed(2)
    n_old = torch.randn(tensor_shape[0], r, generator=generator, dtype=torch.float64)
    v_old = torch.randn(50, r, generator=generator, dtype=torch.float64)
    products = []
    for seed in range(2000):
        state["N/weight"].copy_(n_old)
        state["V/weight"].copy_(v_old)
        fresh = optimizer.noise.stream(seed).draw(tensor, (50, r), RIGHT)
        optimizer.renew(state, tensor, fresh)
        v, projected = state["V/weight"].numpy(), state["N/weight"].numpy()
        products.append(torch.tensor(projected @ v.T))
        if seed < 5:
            fit = np.linalg.lstsq(v, (n_old @ v_old.t()).T.numpy(), rcond=None)[0].T
            np.testing.assert_allclose(projected, fit @ (v.T @ v) / 50, rtol=1e-9, atol=1e-12)
            once = projected.copy()
            optimizer.renew(state, tensor, fresh)  # storing the same V again changes nothing
            np.testing.assert_array_equal(state["N/weight"].numpy(), once)
    assert_mean(torch.stack(products), n_old @ v_old.t() * (r / 50))


def test_official_momentum_of_matrices_starts_anew_with_interval_one():
    model = Linear()
    optimizer = LOZOM(model.named_parameters(), interval=1, compat="official", noise=PhiloxNoise(0))
    for _ in range(4):
        optimizer.step(model)
    stream = optimizer.noise.stream(optimizer.noise.seed(3, 1))
    u = stream.draw(optimizer.tensors[0], (2, 2), LEFT)
    torch.testing.assert_close(optimizer.zo_state["N/weight"], optimizer.last_step.coefficients[0] * u)


@pytest.mark.parametrize(("cls", "rule"), [(LOZO, None), (LOZO, Momentum()), (LOZO, Adam()), (LOZOM, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_in_mid_run_is_bit_identical(cls, rule, dtype):
    def make(model):
        return cls(model.named_parameters(), lr=0.05, interval=3, rule=rule, scale="rms", weight_decay=0.1)

    model = Linear(dtype)
    optimizer = make(model)
    for step in range(8):
        if step == 5:
            twin = copy.deepcopy(model)
            other = make(twin)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step(model)
        if step >= 5:
            other.step(twin)
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    assert optimizer.tensors_state().keys() == other.tensors_state().keys()


@pytest.mark.parametrize("cls", [LOZO, LOZOM])
def test_a_closure_that_fails_where_v_is_new_can_be_called_again(cls):
    ends = []
    for fails in (False, True):
        model = Linear()
        optimizer = cls(model.named_parameters(), lr=0.05, interval=2)
        calls = iter(range(10**6))

        def closure():
            if next(calls) == 5 and fails:
                raise KeyboardInterrupt
            return model()

        while optimizer.steps < 6:
            try:
                optimizer.step(closure)
            except KeyboardInterrupt:
                assert optimizer.steps == 2
        ends.append(model.weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cls", [LOZO, LOZOM])
def test_shapes_of_every_kind(cls):
    model = nn.Module()
    for name, shape in {"conv": (4, 3, 2, 2), "row": (1, 7), "scalar": (), "vector": (5,)}.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))
    slopes = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    model.forward = lambda: sum((slopes[n] * p).sum() for n, p in model.named_parameters())  # type: ignore[method-assign]
    model.conv.data = model.conv.data.contiguous(memory_format=torch.channels_last)
    start = model().item()
    optimizer = cls(model.named_parameters(), lr=1e-3, interval=5, check_loss=False)
    closure = Probed(model)
    for _ in range(200):
        optimizer.step(closure)
    assert model().item() < start - 0.2 * sum(float((s**2).sum()) for s in slopes.values()) * 0.2
    d = (closure.seen[0]["conv"] - closure.seen[1]["conv"]).flatten(1)
    assert np.linalg.matrix_rank(d.numpy(), tol=1e-6) == 2
    assert set(optimizer.zo_state) >= {"V/conv"} and "V/row" not in optimizer.zo_state


def test_memory_is_a_few_numbers_a_side():
    model = nn.Linear(300, 200)
    sizes = {}
    for cls in (LOZO, LOZOM):
        optimizer = cls(model.named_parameters(), rank=2)
        optimizer.step(lambda: model.weight.sum())
        sizes[cls] = sum(value.numel() for value in optimizer.zo_state.values())
    assert sizes == {LOZO: 2 * 300, LOZOM: 2 * (300 + 200) + 200 + 1}
    assert optimizer.forwards == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 3}, "weight"),
        ({"rank": float("nan")}, "rank"),
        ({"interval": 0}, "interval"),
        ({"queries": 0}, "queries"),
        ({"queries": 2, "compat": "official"}, "`queries` is 2"),
        ({"compat": "both"}, "compat"),
        ({"eps": 0.0}, "eps"),
        ({"lr": float("nan")}, "lr"),
    ],
)
@pytest.mark.parametrize("cls", [LOZO, LOZOM])
def test_bad_hyperparameters(cls, settings, words):
    with pytest.raises(UserError, match=words):
        cls(Linear().named_parameters(), **settings)


@pytest.mark.parametrize("module", ["mine", "lozo"])  # the second has the name of one of metazo's files
def test_a_subclass_has_no_form_of_published_code_unless_it_gives_one(module):
    own = type("Own", (LOZO,), {"__module__": module})
    with pytest.raises(UserError, match="`compat` is official, and Own has no form with the faults of published code"):
        own(Linear().named_parameters(), compat="official")
    official(own)(faulty := type("Faulty", (own,), {}))
    for cls in (own, faulty):
        assert type(cls(Linear().named_parameters(), compat="official")) is faulty
    del OFFICIAL[own]


@pytest.mark.parametrize("momentum", [1.0, -0.1, float("nan")])
def test_bad_momentum(momentum):
    with pytest.raises(UserError, match="momentum"):
        LOZOM(Linear().named_parameters(), momentum=momentum)
