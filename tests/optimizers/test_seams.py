"""Features that methods of other kinds need: an estimate from one evaluation at theta, gradients, the model, no replay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metazo.errors import UserError
from metazo.optimizers import METHODS, OPTIMIZERS
from metazo.optimizers.base import Update, ZOOptimizer
from metazo.optimizers.registry import register
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.replay import replay
from metazo.settings import build
from metazo.step.estimators import AtTheta
from metazo.step.lowrank import Held
from metazo.step.terms import Term
from tests.optimizers.killed import killed_at

RUN = {
    "model": "pico", "task": "pico_sentiment", "optimizer": "toy-feedback", "lr": 1e-2, "steps": 8, "batch_size": 2,
    "train_examples": 8, "dev_examples": 4, "test_examples": 0, "snapshot_every": 3, "eval_every": 4, "keep": "last",
    "train": ["*mlp*"],
}  # fmt: skip


class Feedback(ZOOptimizer):
    """The gradient of linear maps as factors, from hooks during one evaluation: sum over positions of error input^T."""

    name = "toy-feedback"
    replayable = False
    needs_model = True
    estimator = AtTheta()

    def __init__(self, params, lr: float = 1e-3, eps: float = 1e-3, *, model: nn.Module, **common):
        self.model = model
        super().__init__(params, lr, eps, **common)

    def evaluation(self):
        return torch.enable_grad()

    def evaluate(self, closures):
        names = {id(tensor.param): tensor.name for tensor in self.tensors}
        inputs, outputs, hooks = {}, {}, []
        for module in self.model.modules():
            name = names.get(id(getattr(module, "weight", None)))
            if isinstance(module, nn.Linear) and name:

                def hook(module, args, output, name=name):
                    inputs[name], outputs[name] = args[0].detach(), output

                hooks.append(module.register_forward_hook(hook))
        try:
            loss = sum(closure() for closure in closures) / len(closures)
        finally:
            for hook in hooks:
                hook.remove()
        errors = torch.autograd.grad(loss, list(outputs.values()))
        left = {name: e.flatten(0, -2).t() for name, e in zip(outputs, errors)}
        self.factors = Held(left, {name: x.flatten(0, -2).t() for name, x in inputs.items()}, {})
        return float(loss.detach())

    def update(self, state, step, seeds, losses):
        return Update([1.0], [Term(self.factors, 0, 1.0)])


@pytest.fixture(autouse=True)
def registered():
    register(Feedback)
    yield
    METHODS.pop(Feedback.name)
    OPTIMIZERS.pop(Feedback.name)


@pytest.mark.parametrize("precision", ["auto", "master"])
def test_the_update_is_the_gradient(precision):
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False)).double()
    dtype = torch.bfloat16 if precision == "master" else torch.float64
    model, x = model.to(dtype), torch.randn(5, 4, dtype=dtype)
    start = [p.detach().double().clone() for p in model.parameters()]
    gradient = torch.autograd.grad(model(x).float().square().sum(), list(model.parameters()))
    optimizer = Feedback(model.named_parameters(), lr=0.1, model=model, precision=precision)
    loss = optimizer.step(lambda: model(x).float().square().sum())
    assert loss > 0 and optimizer.forwards == 1 and optimizer.last_step.seeds == ()
    for tensor, before, g in zip(optimizer.tensors, start, gradient):
        found = torch.cat([t.flatten() for _, t in optimizer.weights.read(tensor)]).double()
        rtol = 1e-9 if dtype == torch.float64 else 2e-2
        torch.testing.assert_close(found, (before - 0.1 * g.double()).flatten(), rtol=rtol, atol=rtol)
    with pytest.raises(UserError, match="cannot be replayed"):
        optimizer.step(None, replay=optimizer.last_step)


def run(out, **extra):
    return run_settings(build(FinetuneConfig, RUN, {"out": out}, extra))


def test_a_killed_run_computes_its_steps_again_and_a_log_is_refused(tmp_path):
    run(tmp_path / "whole")
    killed_at(4, run, tmp_path / "cut")
    run(tmp_path / "cut", resume=True)
    for name in ("model/model.safetensors", "steps.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    with pytest.raises(UserError, match="toy-feedback"):
        replay(tmp_path / "whole" / "steps.jsonl", "pico")
