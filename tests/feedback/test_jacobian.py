"""The label-free fit against Jacobians that are known or computed by autograd; its files; alignment with the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metazo.bench.architectures import build
from metazo.errors import UserError
from metazo.feedback.alignment import alignments
from metazo.feedback.chain import exact_errors
from metazo.feedback.jacobian import fit_jacobian
from metazo.feedback.passes import Recorder
from metazo.feedback.residual import find_residual
from metazo.feedback.surrogates import Column, Exact, Skip
from tests.feedback.test_surrogates import matrix

WIDTH = 6


class Bent(nn.Module):
    """x + b(tanh(a x)): a residual block whose Jacobian depends on x."""

    def __init__(self, curved: bool):
        super().__init__()
        self.a, self.b = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2))
        self.curved = curved

    def forward(self, hidden_states):
        inner = self.a(hidden_states)
        return hidden_states + self.b(inner.tanh() if self.curved else inner)


class Stack(nn.Module):
    def __init__(self, curved: bool):
        super().__init__()
        self.layers = nn.ModuleList([Bent(curved) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def stack(curved: bool, batches: int, rows: int):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Stack(curved)
        inputs = [torch.randn(rows, 2, WIDTH, dtype=torch.float64) for _ in range(batches)]
    return model, inputs, [lambda x=x: model(x).square().mean() for x in inputs]


def test_a_linear_network_gives_its_jacobian() -> None:
    model, _, closures = stack(False, 8, 20)
    fitted = fit_jacobian(model, closures, rank=WIDTH, ridge=0.0)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    above = {1: eye + model.layers[2].b.weight @ model.layers[2].a.weight}
    above[0] = above[1] @ (eye + model.layers[1].b.weight @ model.layers[1].a.weight)
    assert set(fitted.down) == {0, 1}
    for index, jacobian in above.items():
        assert fitted.trust[index] == pytest.approx(1, abs=1e-6)
        assert torch.allclose(matrix(fitted, index).double(), jacobian, atol=1e-5)


def test_a_bent_network_gives_its_mean_jacobian() -> None:
    """Equal to the mean of autograd's Jacobians over the same inputs, within the Monte Carlo error."""
    model, inputs, closures = stack(True, 40, 50)
    fitted = fit_jacobian(model, closures, rank=WIDTH, ridge=0.0, orthogonal=False, draws=8)
    states = torch.cat([model.layers[0](x) for x in inputs]).flatten(0, 1)
    upper = torch.func.vmap(torch.func.jacrev(lambda x: model.layers[2](model.layers[1](x))))
    mean = upper(states).mean(0)
    error = (matrix(fitted, 0).double() - mean).norm()
    assert error < 0.02 * mean.norm()
    assert error < 0.2 * (mean - torch.eye(WIDTH, dtype=torch.float64)).norm()  # far closer than the identity


def test_the_fit_is_the_mean_jacobian_within_its_error_bars() -> None:
    """Of a transformer whose positions all carry loss: e_i at each of them gives row i of the mean Jacobian by autograd.

    Fits of several seeds differ by the draw of the cotangents alone, so the mean over the seeds must be within a few
    standard errors of it.
    """
    tiny, seeds = build("BERT"), 16
    residual = find_residual(tiny.model)
    (one,) = Recorder(residual, {}, 0).capture([tiny.every]).passes
    carrying, width = one.delta.ne(0).any(-1, keepdim=True), one.delta.shape[-1]
    basis = [torch.eye(width, dtype=torch.float64)[i] * carrying for i in range(width)]
    mean = {
        index: torch.stack([(e * carrying).sum((0, 1)) / carrying.sum() for e in errors])
        for index, errors in exact_errors(residual, one, basis)
        if index >= 0
    }
    how = {"rank": width, "ridge": 0.0, "orthogonal": False, "draws": 12}
    fits = [fit_jacobian(tiny.model, [tiny.every] * 4, seed=seed, **how) for seed in range(seeds)]
    for index, jacobian in mean.items():
        # the trust is fitted on other draws; what is compared is the regression itself
        found = torch.stack([(matrix(fit, index) / fit.trust[index]).double() for fit in fits])
        error = found.std(0) / seeds**0.5
        z = (found.mean(0) - jacobian) / error
        # squares of Student's t with 15 degrees of freedom, of mean 15 / 13; entries of a fit are correlated
        assert 0.5 < float(z.square().mean()) < 2.2
        eye = torch.eye(width, dtype=torch.float64)
        assert float(((eye - jacobian) / error).square().mean()) > 4  # and the identity is far outside of them


def test_low_rank_and_trust() -> None:
    model, _, closures = stack(False, 8, 20)
    fitted = fit_jacobian(model, closures, rank=2, ridge=0.0)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    jacobian = (eye + model.layers[2].b.weight @ model.layers[2].a.weight).detach()
    u, s, vt = torch.linalg.svd(jacobian - eye)
    best = eye + (u[:, :2] * s[:2]) @ vt[:2]
    assert torch.allclose(matrix(fitted, 1).double() / fitted.trust[1], best, atol=1e-5)
    assert fit_jacobian(model, closures, rank=0).down[0].shape == (WIDTH, 0)
    # the trust is the regression of e on the map's output, so it is below 1 if this output is too long
    assert 0 < fit_jacobian(model, closures, rank=0).trust[0] != 1


@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_exact_errors_are_autograds(name: str) -> None:
    tiny = build(name)
    residual = find_residual(tiny.model)
    (one,) = Recorder(residual, {}, 0).capture([tiny.every]).passes
    errors = dict(exact_errors(residual, one, [one.delta, 2 * one.delta]))
    seen = {}
    handles = [
        block.register_forward_pre_hook(
            lambda m, args, kwargs, k=k: seen.update({k - 1: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
        for k, block in enumerate(residual.blocks)
    ]
    loss = tiny.every()
    for handle in handles:
        handle.remove()
    for index, state in seen.items():
        (true,) = torch.autograd.grad(loss, state, retain_graph=True)
        assert torch.allclose(errors[index][0], true, rtol=1e-9, atol=1e-12)
        assert torch.allclose(errors[index][1], 2 * true, rtol=1e-9, atol=1e-12)


def test_cosines_are_those_of_the_pairs_held_out() -> None:
    model, inputs, closures = stack(True, 8, 20)
    found: dict[int, tuple[float, float]] = {}
    closures = [lambda x=x: model(x).mean(1).square().mean() for x in inputs]  # the same delta at both positions
    fitted = fit_jacobian(model, closures, rank=WIDTH, ridge=0.0, orthogonal=False, draws=1, cosines=found)
    generator, pairs = torch.Generator().manual_seed(0), []
    for number, x in enumerate(inputs):
        v = torch.randn(len(x), WIDTH, generator=generator, dtype=torch.float64)[:, None].expand(-1, 2, -1)
        if number % 4 == 3:
            states = model.layers[1](model.layers[0](x)).detach().requires_grad_()
            (e,) = torch.autograd.grad(model.layers[2](states), states, v)
            pairs.append((v.reshape(-1, WIDTH), e.reshape(-1, WIDTH)))
    v, e = (torch.cat(column) for column in zip(*pairs))
    for place, mapped in enumerate((v, v @ matrix(fitted, 1).double())):
        cosine = torch.cosine_similarity(mapped.flatten(), e.flatten(), dim=0)
        assert found[1][place] == pytest.approx(float(cosine), abs=1e-6)
    trust = float((e * (v @ matrix(fitted, 1).double())).sum() / (v @ matrix(fitted, 1).double()).square().sum())
    assert trust == pytest.approx(1, abs=1e-5)  # the trust is in the matrix already


def test_cosines_of_a_loss_with_a_target_at_each_position_are_those_of_its_own_errors() -> None:
    """Every map is fitted to errors that share a cotangent, which other positions add to; the true errors do not."""
    tiny = build("Llama")
    found: dict[int, tuple[float, float]] = {}
    fitted = fit_jacobian(tiny.model, [tiny.every] * 4, rank=4, seed=1, cosines=found)
    residual = find_residual(tiny.model)
    (one,) = Recorder(residual, {}, 0).capture([tiny.every]).passes
    assert found and one.delta is not None
    for index, (error,) in exact_errors(residual, one, [one.delta]):
        for place, mapped in enumerate((one.delta, one.delta @ matrix(fitted, index).double()) if index >= 0 else ()):
            carrying = one.delta.ne(0).any(-1)
            cosine = torch.cosine_similarity(mapped[carrying].flatten(), error[carrying].flatten(), dim=0)
            assert found[index][place] == pytest.approx(float(cosine), abs=1e-6)


def test_settings_that_cannot_be_fitted() -> None:
    model, _, closures = stack(True, 4, 3)
    with pytest.raises(UserError, match="at least 4 batches, and 2 were given"):
        fit_jacobian(model, closures[:2])
    run = []
    counted = [lambda closure=closure: run.append(1) or closure() for closure in closures]
    with pytest.raises(UserError, match="`rank` is 7 and the model.s width is 6"):
        fit_jacobian(model, counted, rank=7)
    assert len(run) == 1, "it is known after the first batch"
    few = [lambda x=x: model(x).square().mean() for x in torch.randn(4, 1, 2, WIDTH, dtype=torch.float64)]
    with pytest.raises(
        UserError, match="`ridge` is 0 and the cotangents span 3 of the 6 dimensions of the hidden states"
    ):
        fit_jacobian(model, few, rank=2, ridge=0.0, draws=1)
    fit_jacobian(model, few, rank=2, ridge=0.0, draws=2)
    fit_jacobian(model, few, rank=2, draws=1)
    with pytest.raises(UserError, match="The last block needs no feedback"):
        fit_jacobian(nn.ModuleDict({"layers": model.layers[:1]}), closures)


def test_alignment_beside_dense_gradients() -> None:
    tiny = build("Llama")
    rows = {(row.block, row.site): row for row in alignments(tiny.model, [tiny.answer, tiny.every], Skip())}
    ((tiny.answer() + tiny.every()) / 2).backward()
    true = {name: p.grad.clone() for name, p in tiny.model.named_parameters()}
    from tests.feedback.test_architectures import estimate

    one, two = estimate(tiny, tiny.answer, Skip())[0], estimate(tiny, tiny.every, Skip())[0]
    inside = [name for name in true if name.startswith("model.layers.")]
    found = torch.cat([((one[name] + two[name]) / 2).flatten() for name in inside])
    wanted = torch.cat([true[name].flatten() for name in inside])
    assert rows[None, "all"].cosine == pytest.approx(float(torch.cosine_similarity(found, wanted, dim=0)), abs=1e-6)
    assert rows[None, "all"].ratio == pytest.approx(float(found.norm() / wanted.norm()), rel=1e-6)
    name = "model.layers.0.mlp.up_proj.weight"
    cosine = torch.cosine_similarity((one[name] + two[name]).flatten(), true[name].flatten(), dim=0)
    assert rows[0, "mlp.up_proj.weight"].cosine == pytest.approx(float(cosine), abs=1e-6)
    assert rows[2, "all"].cosine == pytest.approx(1, abs=1e-9)  # delta is exact there
    everywhere = alignments(tiny.model, [tiny.answer], Exact())
    assert all(row.cosine == pytest.approx(1, abs=1e-9) for row in everywhere)
    column = {(row.block, row.site): row.cosine for row in alignments(tiny.model, [tiny.answer], Column())}
    skip = {(row.block, row.site): row.cosine for row in alignments(tiny.model, [tiny.answer], Skip())}
    assert column[None, "all"] > skip[None, "all"]
