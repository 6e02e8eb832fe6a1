"""A tuner fits a model whose names have a wrapper's prefix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metazo.optimizers import MeZO
from metazo.tuner.match import BlockSpec, fit, plain_name
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


WRAPPED = {
    "torch.compile": lambda m: torch.compile(m, backend="eager"),
    "DataParallel": nn.DataParallel,
    "both": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_tuner_fits_a_wrapped_model(kind):
    plain, wrapped = model(), WRAPPED[kind](model())
    shapes = [(name, tuple(p.shape)) for name, p in plain.named_parameters()]
    blocks = [BlockSpec(name, [(name, shape)]) for name, shape in shapes]
    match = fit(blocks, [(name, tuple(p.shape)) for name, p in wrapped.named_parameters()])
    assert match.ok and match.matched == [0, 1, 2, 3]
    names, sigmas = [name for name, _ in reversed(shapes)], []
    for module in (plain, wrapped):
        scale = TunerScale(pertnn=PertNN(4, seed=1), networks=names)
        optimizer = MeZO(module.named_parameters(), scale=scale, check_loss=False)
        optimizer.step(lambda: module(torch.ones(1, 4)).sum())
        sigmas.append(optimizer.last_step.scales)
    assert sigmas[0] == sigmas[1] and len(set(sigmas[0])) == 4


def test_a_compiled_model_has_the_noise_of_the_model():
    weights, x = [], torch.linspace(-1, 1, 12).reshape(3, 4)
    for wrap in (lambda module: module, WRAPPED["torch.compile"]):
        module = model()
        wrapped = wrap(module)
        optimizer = MeZO(wrapped.named_parameters(), lr=0.1)
        for _ in range(3):
            optimizer.step(lambda: wrapped(x).square().mean())
        weights.append([p.detach().clone() for p in module.parameters()])
    assert all(map(torch.equal, *weights)) and not torch.equal(weights[0][0], model()[0].weight)


def test_peft_names_and_what_is_in_no_tuner():
    assert plain_name("base_model.model.model.layers.0.q.base_layer.weight") == "model.layers.0.q.weight"
    assert plain_name("module.x.module.weight") == "x.module.weight"
    blocks = [BlockSpec("q.weight", [("q.weight", (2, 2))])]
    shapes = [("base_model.model.q.base_layer.weight", (2, 2)), ("base_model.model.q.lora_A.default.weight", (1, 2))]
    match = fit(blocks, shapes)
    assert match.matched == [0] and match.different == 1
    assert match.differences == ["q.lora_A.default.weight (1, 2) is not in the tuner"]
