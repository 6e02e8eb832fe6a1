"""Probes that are sums of terms: in place, through masters and compensated, in turn and together, and removed exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metazo.noise import PhiloxNoise
from metazo.optimizers.base import Update, ZOOptimizer
from metazo.step.directions import Isotropic
from metazo.step.lowrank import Held, LowRank
from metazo.step.rules import Momentum
from metazo.step.terms import Term
from tests.optimizers.contract import IDS, llama


class MeanAndNoise(ZOOptimizer):
    """Probes at theta + mean +/- eps z, the mean a given direction: the shortest form of a learned mean plus noise."""

    name = "mean-and-noise"
    low_rank = True
    rank = 2

    def init(self, tensors):
        generator = torch.Generator().manual_seed(1)
        state = {}
        for tensor in tensors:
            dtype = torch.promote_types(tensor.param.dtype, torch.float32)
            state[f"mean/{tensor.name}"] = 0.01 * torch.randn(tensor.param.shape, generator=generator).to(dtype)
        return state

    def held(self):
        means = {t.name: self.zo_state[f"mean/{t.name}"] for t in self.tensors}
        left = {name: m[:, :1] for name, m in means.items() if m.ndim > 1}
        right = {name: torch.ones(means[name].shape[1], 1, dtype=means[name].dtype) for name in left}
        return Held(left, right, {name: m for name, m in means.items() if m.ndim == 1})

    def propose(self, state, step, seeds):
        self.mean = self.held()
        right = {n: torch.ones(m.shape[1], 2).to(m) for n, m in self._matrices().items()}
        return LowRank(Isotropic(), right)

    def _matrices(self):
        return {t.name: t.param for t in self.tensors if t.param.ndim > 1}

    def displacements(self, estimator, direction, seeds):
        plain = super().displacements(estimator, direction, seeds)
        return [(Term(self.mean, 0, 1.0), *terms) for terms in plain]

    def update(self, state, step, seeds, losses):
        (c,) = self.estimator.coefficients(losses, self.eps)
        return Update([c], [Term(None, seeds[0], c), Term(self.mean, 0, -0.5)])


def layer(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(6, 5).to(dtype)


def displacement(optimizer, tensor, sign, step=0):
    stream = optimizer.noise.stream(optimizer.noise.seed(step, 0))
    direction = optimizer.propose(optimizer.zo_state, step, [stream.seed])
    mean = optimizer.held().draw(stream, tensor)
    return mean.double(), sign * optimizer.eps * direction.draw(stream, tensor).double()


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float64, "auto"),
        (torch.float32, "auto"),
        (torch.bfloat16, "master"),
        (torch.bfloat16, "compensated-16"),
        (torch.bfloat16, "compensated-8"),
    ],
)
@pytest.mark.parametrize("rule", [None, Momentum(0.0)], ids=["fused", "buffered"])
def test_each_probe_is_the_sum_and_the_update_starts_from_theta(dtype, precision, rule):
    model = layer(dtype)
    optimizer = MeanAndNoise(
        model.named_parameters(), lr=0.01, eps=0.05, precision=precision, rule=rule, check_loss=False
    )
    optimizer._prepare()
    start = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    seen = []

    def closure():
        seen.append({n: p.clone().double() for n, p in model.named_parameters()})
        return (model(torch.ones(1, 6, dtype=dtype)).double() ** 2).sum()

    optimizer.step(closure)
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    c = optimizer.last_step.coefficients[0]
    for tensor in optimizer.tensors:
        for sign, point in zip((1.0, -1.0), seen):
            mean, noise = displacement(optimizer, tensor, sign)
            torch.testing.assert_close(point[tensor.name], start[tensor.name] + mean + noise, rtol=rtol, atol=rtol)
        mean, noise = displacement(optimizer, tensor, 1.0)
        wanted = start[tensor.name] - 0.01 * (c * noise / 0.05 - 0.5 * mean)
        found = torch.cat([t.double().flatten() for _, t in optimizer.weights.read(tensor)]).view_as(wanted)
        tolerance = {"master": 1e-6, "compensated-16": 1e-5, "compensated-8": 1e-3}.get(precision, rtol)
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["master", "compensated-16"])
def test_narrow_weights_come_back_to_the_bit(precision):
    model = layer(torch.bfloat16)
    optimizer = MeanAndNoise(model.named_parameters(), lr=0.0, eps=0.05, precision=precision)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(20):
        if step == 10:
            with pytest.raises(KeyError):
                optimizer.step(lambda: {}["loss"])
        optimizer.step(lambda: model(torch.ones(1, 6, dtype=torch.bfloat16)).sum())
        assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())


def test_only_terms_that_change_are_moved(monkeypatch):
    """The mean is not removed between mean + z and mean - z: two passes for the first probe, one for the second."""
    model = layer(torch.float64)
    optimizer = MeanAndNoise(model.named_parameters(), lr=0.0, check_loss=False)
    passes = []
    for cls in (LowRank, Held):
        add = cls.add_all_
        monkeypatch.setattr(
            cls, "add_all_", lambda self, s, m, add=add: [passes.append(type(self)), add(self, s, m)][1]
        )
    counts = []
    optimizer.step(lambda: [counts.append(len(passes)), model(torch.ones(1, 6, dtype=torch.float64)).sum()][1])
    assert counts == [2, 3] and len(passes) == 5  # and the update removes both in its own two passes


def test_a_probe_that_the_update_does_not_share_comes_off_first():
    model = layer(torch.float64)
    optimizer = MeanAndNoise(model.named_parameters(), lr=0.1)
    optimizer.update = lambda state, step, seeds, losses: Update([1.0], [Term(None, seeds[0], 1.0)])
    optimizer._prepare()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step(lambda: model(torch.ones(1, 6, dtype=torch.float64)).sum())
    for tensor in optimizer.tensors:
        _, noise = displacement(optimizer, tensor, 1.0)
        torch.testing.assert_close(tensor.param.data, start[tensor.name] - 0.1 * noise / optimizer.eps)


@pytest.mark.parametrize("scale", [None, "rms"])
def test_together_is_in_turn(scale):
    losses = []
    for probing in ("in-turn", "together"):
        model = llama().double()
        optimizer = MeanAndNoise(model.named_parameters(), lr=1e-3, eps=1e-2, probing=probing, scale=scale)
        for _ in range(2):
            optimizer.step(lambda: model(input_ids=IDS, labels=IDS).loss)
            losses.append(optimizer.last_step.losses)
        assert optimizer.forwards == 4 and (probing == "in-turn" or optimizer.zo_state["probing"] == 2)
    for one, other in zip(losses[:2], losses[2:]):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_replay_and_a_block_scale():
    """A replay is bit-identical; a term with the method's own direction is scaled by the block scale as well."""
    ends = []
    records = []
    for replayed in (False, True):
        model = layer(torch.float32)
        optimizer = MeanAndNoise(model.named_parameters(), lr=0.01, eps=0.05, scale="rms", noise=PhiloxNoise(2))
        for step in range(4):
            if replayed:
                optimizer.step(None, replay=records[step])
            else:
                optimizer.step(lambda: (model(torch.ones(1, 6)) ** 2).sum())
                records.append(optimizer.last_step)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))
