"""The label-free fit against Jacobians that are known or computed by autograd; its files; alignment with the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metazo.bench.architectures import build
from metazo.errors import UserError
from metazo.feedback.alignment import alignments
from metazo.feedback.chain import exact_errors
from metazo.feedback.jacobian import fit_jacobian, load_jacobian, save_jacobian
from metazo.feedback.passes import Recorder
from metazo.feedback.residual import find_residual
from metazo.feedback.surrogates import Column, Exact, Skip, matrix
from metazo.optimizers.feedback import Feedback

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


def test_files(tmp_path) -> None:
    model, _, closures = stack(True, 8, 20)
    fitted = fit_jacobian(model, closures, rank=2)
    save_jacobian(tmp_path / "f.safetensors", fitted, "base")
    again = load_jacobian(tmp_path / "f.safetensors")
    assert again.trust == fitted.trust
    assert all(
        torch.equal(again.down[k], fitted.down[k]) and torch.equal(again.up[k], fitted.up[k]) for k in fitted.down
    )
    before = closures[0]().item()
    optimizer = Feedback(model.named_parameters(), 1e-2, model=model, jacobian=str(tmp_path / "f.safetensors"))
    losses = [optimizer.step(closures[0]) for _ in range(5)]
    assert losses[0] == pytest.approx(before) and losses[-1] < 0.95 * before
    (tmp_path / "g.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(UserError, match="g.safetensors is not a usable file of feedback"):
        load_jacobian(tmp_path / "g.safetensors")
    with pytest.raises(UserError, match="is not a file; check the path"):
        load_jacobian(tmp_path / "h")
    with pytest.raises(UserError, match="feedback needs `jacobian`"):
        Feedback(model.named_parameters(), 1e-3, model=model)


def test_settings_that_cannot_be_fitted() -> None:
    model, _, closures = stack(True, 4, 3)
    with pytest.raises(UserError, match="at least 4 batches, and 2 were given"):
        fit_jacobian(model, closures[:2])
    with pytest.raises(UserError, match="`rank` is 7 and the model.s width is 6"):
        fit_jacobian(model, closures, rank=7)
    with pytest.raises(UserError, match="The last block needs no feedback"):
        fit_jacobian(model, closures, lowest=2)


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
