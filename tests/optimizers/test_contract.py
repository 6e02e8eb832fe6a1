"""The contract of every method in OPTIMIZERS. A method that is added to the table is tested too.

This file tests the direction of the update, and the tensors that may change. test_contract_descent.py: descent.
test_contract_state.py: saving, replay, determinism, processes. tests/mutate.py breaks the library on purpose and counts
what these three files notice.
"""

from __future__ import annotations

import gc
import math
import re
import weakref

import pytest
import torch
from torch import nn

from metazo.optimizers import OPTIMIZERS
from metazo.optimizers.base import DECAY_EXEMPT
from metazo.step.scales import normalisation
from tests.optimizers.contract import IDS, NAMES, case, llama, make, quadratic, take

every_method = pytest.mark.parametrize("name", NAMES)


@every_method
def test_hyperparameters_have_defaults_types_and_help(name):
    for key, parameter in OPTIMIZERS[name].hyperparameters().items():
        assert parameter.default is not parameter.empty and parameter.annotation is not parameter.empty, key
        docs = "\n".join(cls.__doc__ or "" for cls in OPTIMIZERS[name].__mro__)
        assert re.search(rf"^ +{key}: \S", docs, re.M), key


@every_method
def test_update_lies_along_the_probes(name):
    """The displacements at which the closure is called span the update, tensor by tensor: finds wrong seeds and masks."""
    problem = quadratic()
    optimizer = make(name, problem.named(), 1e-3)
    seen: list[list[torch.Tensor]] = []

    def closure():
        seen.append(problem.copies())
        return problem()

    start = problem.copies()
    take(optimizer, closure)
    moved = 0
    for index, (p, before) in enumerate(zip(problem.parameters(), start)):
        update = (p.detach() - before).flatten()
        probes = torch.stack([(point[index] - before).flatten() for point in seen], dim=1)
        if probes.abs().max() < 1e-9:
            assert not update.abs().max() > 1e-9, "moved without being probed"
            continue
        moved += 1
        if case(name).along == "free":
            assert update.abs().max() > 0
        elif case(name).along == "sign":
            signs = torch.sign(update) * torch.sign(probes[:, -1])
            assert (signs == signs[0]).all() and signs[0] != 0
        else:
            fit = torch.linalg.lstsq(probes, update[:, None], driver="gelsd").solution
            assert float((probes @ fit - update[:, None]).norm()) < 1e-4 * float(update.norm())
    assert moved


@every_method
def test_a_block_scale_multiplies_probe_and_update(name):
    """The probe is scaled by kappa sigma_b, and the update also by the ratio of the coefficients c."""
    if not case(name).scaled:
        pytest.skip("brings its own block scale")
    counts, compared = torch.tensor([12.0, 3.0], dtype=torch.float64), 0
    for seed in range(4):
        probes, updates, sigma = [], [], torch.ones(2)
        for scale in (None, "rms"):
            problem, seen = quadratic(), []
            optimizer, start = make(name, problem.named(), 1e-3, scale=scale, seed=seed), problem.copies()
            take(optimizer, lambda: [seen.append(problem.copies()), problem()][1])
            points = [[value - before for value, before in zip(point, start)] for point in [*seen, problem.copies()]]
            probes.append(next(point for point in points if any(value.abs().max() > 1e-9 for value in point)))
            updates.append(points[-1])
            sigma = torch.tensor(optimizer.last_step.scales if optimizer.last_step else (), dtype=torch.float64)
        factors = (sigma * normalisation(sigma, counts)).tolist()
        assert min(factors) < 0.9 * max(factors)
        for plain, scaled, factor in zip(*probes, factors):
            torch.testing.assert_close(scaled, plain * factor, rtol=1e-6, atol=1e-12)
        ratios = [(b / a).flatten() / f for a, b, f in zip(*updates, factors) if a.abs().max() > 1e-12]
        if case(name).along == "span" and optimizer.estimator.queries == 1 and len(ratios) == 2:
            compared += 1
            torch.testing.assert_close(torch.cat(ratios), ratios[0][0].expand(15), rtol=1e-5, atol=0)
    assert compared or case(name).along != "span" or optimizer.estimator.queries > 1


@every_method
def test_tied_weights_count_once(name):
    model = llama(tied=True)
    named = [(key, p) for key, p in model.named_parameters(remove_duplicate=False)]
    assert len({id(p) for _, p in named}) < len(named)
    options = {"layer": "model.embed_tokens.weight"} if name == "dominant-layer" else {}
    optimizer = make(name, named, 1e-3, **options)
    take(optimizer, lambda: model(input_ids=IDS, labels=IDS).loss)
    assert len({id(t.param) for t in optimizer.tensors}) == len(optimizer.tensors)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    groups = [{"params": named[:1]}, {"params": named[1:], "lr": 1e-4}]  # also if its two names are in two groups
    assert sum(len(group["params"]) for group in make(name, groups, 1e-3, **options).param_groups) == len(
        optimizer.tensors
    )


@every_method
@pytest.mark.parametrize("compat", ["paper", "official"])
def test_tensors_without_entries_change_nothing(name, compat):
    """With the method's own settings, and with block scales if it takes them."""
    kinds = (
        [{"compat": compat}] if "compat" in OPTIMIZERS[name].hyperparameters() else [{}] if compat == "paper" else []
    )
    kinds += [{"scale": "rms"}] if compat == "paper" and case(name).scaled and not OPTIMIZERS[name].needs_tuner else []
    for options in kinds:
        found = []
        for shapes in ((), ((0, 4), (4, 0), (0,), (3, 0, 2))):
            problem = quadratic(torch.float32)
            empty = [(f"layers.0.empty{k}", nn.Parameter(torch.empty(shape))) for k, shape in enumerate(shapes)]
            optimizer = make(name, [*empty[:2], *problem.named(), *empty[2:]], 1e-3, **options)
            for _ in range(3):
                take(optimizer, problem)
            state = optimizer.state_dict()
            optimizer.load_state_dict(state)
            found.append((problem.copies(), optimizer.last_step, state["zo"].keys()))
        assert (
            all(torch.equal(one, other) for one, other in zip(found[0][0], found[1][0]))
            and found[0][1:] == found[1][1:]
        )


@every_method
def test_frozen_parameters_are_untouched(name):
    problem = quadratic(torch.float32)
    bias = problem.layers[0].b
    bias.requires_grad_(False)
    kept, weight = bias.detach().clone(), problem.layers[0].w.detach().clone()
    optimizer = make(name, problem.named(), 1e-3)

    def closure():
        assert torch.equal(bias, kept)
        return problem()

    for _ in range(8):
        take(optimizer, closure)
    assert not torch.equal(problem.layers[0].w, weight)


@every_method
def test_parameter_groups(name):
    problem = quadratic()
    (first, w), (second, b) = problem.named()
    start = problem.copies()
    groups = [{"params": [(first, w)]}, {"params": [(second, b)], "lr": 0.0, "weight_decay": 0.5}]
    optimizer = make(name, groups, 1e-3)
    for _ in range(8):
        take(optimizer, problem)
    assert float((b.detach() - start[1]).abs().max()) < 1e-12 < float((w.detach() - start[0]).abs().max())


@every_method
def test_weight_decay(name):
    """On a flat loss, theta <- (1 - lr decay)^n theta, for names that are not exempt."""
    problem = quadratic()
    (_, w), (_, b) = problem.named()
    named = [("layers.0.w", w), ("layers.0.bias", b)]
    assert "bias" in DECAY_EXEMPT
    start = problem.copies()
    optimizer = make(name, named, 0.1, weight_decay=0.5)
    for _ in range(3):
        take(optimizer, lambda: 1.0)
    torch.testing.assert_close(w.detach(), start[0] * 0.95**3, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(b.detach(), start[1], rtol=1e-9, atol=1e-12)


@every_method
def test_bfloat16_does_not_drift(name):
    problem = quadratic(torch.bfloat16)
    start = problem.copies()
    optimizer, seen = make(name, problem.named(), 0.0), []

    def closure():
        seen.append(any(not torch.equal(p, s) for p, s in zip(problem.parameters(), start)))
        return problem()

    for _ in range(50):
        take(optimizer, closure)
    assert all(torch.equal(p, s) for p, s in zip(problem.parameters(), start)) and any(seen)


@every_method
def test_float32_hardly_drifts(name):
    problem = quadratic(torch.float32)
    start = problem.copies()
    optimizer = make(name, problem.named(), 0.0)
    for _ in range(50):
        take(optimizer, problem)
    assert max(float((p - s).abs().max().detach()) for p, s in zip(problem.parameters(), start)) < 2e-6


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exception_leaves_the_weights(name, dtype):
    problem = quadratic(dtype)
    optimizer = make(name, problem.named(), case(name).quadratic)
    for _ in range(3):
        take(optimizer, problem)
    start, count = problem.copies(), optimizer.forwards
    take(optimizer, problem)
    probes = optimizer.forwards - count
    assert probes >= 2
    for failing in range(probes):
        start, calls, steps = problem.copies(), 0, optimizer.steps

        def closure():
            nonlocal calls
            calls += 1
            if calls > failing:
                raise RuntimeError("out of memory")
            return problem()

        with pytest.raises(RuntimeError, match="out of memory"):
            take(optimizer, closure)
        assert optimizer.steps == steps
        for p, s in zip(problem.parameters(), start):
            assert torch.equal(p, s) if dtype == torch.bfloat16 else float((p - s).abs().max().detach()) < 1e-6


@every_method
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_skips_the_step(name, bad):
    problem = quadratic(torch.bfloat16)
    optimizer = make(name, problem.named(), case(name).quadratic)
    for _ in range(3):
        take(optimizer, problem)
    start = problem.copies()
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        return bad if calls == 2 else problem()

    loss = take(optimizer, closure)
    assert optimizer.last_step is not None and optimizer.last_step.coefficients == ()
    assert optimizer.steps == 4 and not math.isfinite(loss)
    assert all(torch.equal(p, s) for p, s in zip(problem.parameters(), start))
    for _ in range(4):
        take(optimizer, problem)
    assert any(not torch.equal(p, s) for p, s in zip(problem.parameters(), start))
    assert all(bool(torch.isfinite(p).all()) for p in problem.parameters())


@every_method
def test_a_scheduler_drives_the_learning_rate(name):
    problem = quadratic(torch.bfloat16)
    optimizer = make(name, problem.named(), rate := case(name).quadratic)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 3 else 0.0)
    points = [problem.copies()]
    for _ in range(6):
        take(optimizer, problem)
        points.append(problem.copies())
        scheduler.step()
        if len(points) == 2:
            assert optimizer.last_step is not None and optimizer.last_step.lr == (rate,)
    still = [all(torch.equal(x, y) for x, y in zip(a, b)) for a, b in zip(points, points[1:])]
    assert not still[0] and still[3:] == [True, True, True]


@every_method
def test_closures_are_averaged(name):
    """Gradient accumulation: two closures on halves give the step of one closure on the mean."""
    points = []
    for halves in (False, True):
        problem = quadratic()
        parts = [lambda: 1.5 * problem(), lambda: 0.5 * problem()]
        optimizer = make(name, problem.named(), 1e-3)
        for _ in range(4):
            take(optimizer, parts if halves else problem)
        points.append(problem.flat().detach())
    torch.testing.assert_close(points[0], points[1], rtol=1e-6, atol=1e-8)
    assert not torch.equal(points[0], quadratic().flat())


@every_method
def test_a_number_without_dimensions_is_trained(name):
    """As CLIP's logit_scale; the steps are repeated until every method has chosen its layer."""
    model, x = Scaled(), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    optimizer = make(name, list(model.named_parameters()), 1e-2)
    for _ in range(20):
        take(optimizer, lambda: model(x))
    assert all(p.isfinite().all() for p in model.parameters()) and model.layers[0].scale != 1.0


class Scaled(nn.Module):
    """A number without dimensions beside a matrix."""

    def __init__(self):
        super().__init__()
        layer = nn.Module()
        layer.scale, layer.w = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(3, 4))
        self.layers = nn.ModuleList([layer])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layers[0]
        return (x @ layer.w.t() * layer.scale).square().mean()


@pytest.mark.parametrize("precision", ["default", "compensated-8"])
@every_method
def test_the_weights_are_freed_with_the_optimizer_and_the_model(name, precision):
    """At once: weights that wait for Python's search for cycles are still there while the next model is loaded."""
    if precision != "default" and "precision" not in OPTIMIZERS[name].common:
        pytest.skip("has no precision policies")
    options = {} if precision == "default" else {"precision": precision}

    def trained() -> weakref.ref:
        model = llama().to(torch.bfloat16 if options else torch.float32)
        optimizer = make(name, list(model.named_parameters()), 1e-4, **options)
        for _ in range(2):
            take(optimizer, lambda: model(input_ids=IDS, labels=IDS).loss)
        return weakref.ref(model.lm_head.weight)

    gc.disable()
    try:
        assert trained()() is None
    finally:
        gc.enable()
