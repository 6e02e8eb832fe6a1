"""Compensated weights in one pass: dispatch on the noise stream, bit-identical to separate passes; and torch.compile."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metazo.blocks import named_tensors
from metazo.errors import UserError
from metazo.noise import PhiloxNoise, PhiloxStream, cpu_split
from metazo.optimizers import METHODS
from metazo.optimizers.registry import Method
from metazo.step.directions import Isotropic
from metazo.step.rules import Momentum
from metazo.step.terms import Term
from metazo.step.weights import Weights


def model(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Embedding(700, 48), nn.Linear(48, 33), nn.Tanh(), nn.Linear(33, 5)).to(dtype)


def run(method: type[Method], dtype: torch.dtype, **options):
    module = model(dtype)
    ids = torch.arange(64) * 7 % 700
    optimizer = method(module.named_parameters(), lr=1e-2, eps=1e-2, seed=2**62 + 5, weight_decay=0.1, **options)  # type: ignore[call-arg]
    for _ in range(4):
        optimizer.step(lambda: module(ids).float().square().mean())
    return optimizer.last_step, optimizer.tensors_state(), [p.detach().clone() for p in module.parameters()]


CASES = {
    "mezo": {},
    "mezo, two queries": {"queries": 2},
    "mezo, rademacher": {"noise": "rademacher"},
    "mezo, rms": {"scale": "rms"},
    "mezo, momentum": {"rule": Momentum()},
    "curvzo": {},
    "fzoo": {},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["compensated-16", "compensated-8"])
@pytest.mark.parametrize("named", CASES)
def test_one_pass_is_the_passes_one_by_one(named, precision, dtype, monkeypatch):
    method, options = METHODS[named.partition(",")[0]], CASES[named] | {"precision": precision}
    taken = {"place_split_": 0, "add_split_": 0}
    for name in taken:
        whole = getattr(PhiloxStream, name)

        def counted(self, *args, name=name, whole=whole):
            done = whole(self, *args)
            taken[name] += done
            return done

        monkeypatch.setattr(PhiloxStream, name, counted)
    record, state, weights = run(method, dtype, **options)
    assert taken["place_split_"] > 0
    assert (taken["add_split_"] > 0) == (named not in ("mezo, momentum", "mezo, two queries", "fzoo"))
    for name in taken:
        monkeypatch.setattr(PhiloxStream, name, lambda self, *args: False)
    expected, others, moved = run(method, dtype, **options)
    assert record == expected and all(torch.equal(a, b) for a, b in zip(weights, moved))
    assert all(torch.equal(state[key], others[key]) for key in others)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("width", [48, 2048, 3000])
def test_a_lookup_gets_the_bits_of_the_whole_tensor_in_the_rows_that_it_reads(width, noise, monkeypatch):
    parts, whole = [], cpu_split.place_
    monkeypatch.setattr(cpu_split, "place_", lambda *args: whole(*args) or parts.append(args[-1] is not None))
    table = nn.Embedding(3000, width).to(torch.bfloat16)
    ids = torch.tensor([[0, 2999, 17, 18], [18, 42, 1500, 0]])
    tensors = named_tensors(table.named_parameters())
    weights = Weights(tensors, PhiloxNoise(5, noise), "compensated-8")
    weights.visit([Term(Isotropic(), 2**40 + 3, 0.1)])
    with torch.inference_mode(), weights.evaluating():
        found, expected = table(ids), F.linear(torch.eye(3000, dtype=torch.bfloat16)[ids.flatten()], table.weight.T)
        clipped = F.embedding(ids, table.weight, max_norm=1e9)  # this function may write every row that it reads
    assert torch.equal(found.flatten(0, 1), expected) and torch.equal(found, clipped)
    assert not torch.equal(found, table(ids)) and parts == [True, False, False]
    with weights.evaluating(), pytest.raises(IndexError):
        table(ids + 1)


def test_plain_noise_takes_the_passes_one_by_one():
    expected, _, weights = run(METHODS["mezo"], torch.bfloat16, precision="compensated-8")
    noise = PhiloxNoise(2**62 + 5, backend="torch")
    found, _, others = run(METHODS["mezo"], torch.bfloat16, precision="compensated-8", noise=noise)
    assert found == expected and all(torch.equal(a, b) for a, b in zip(weights, others))


def test_a_model_that_cannot_be_compiled_is_refused_in_one_sentence_and_errors_of_the_model_are_its_own():
    module = model(torch.bfloat16)[1:]
    compiled, x = torch.compile(module, backend="eager", fullgraph=True), torch.ones(2, 48, dtype=torch.bfloat16)
    optimizer = METHODS["mezo"](compiled.named_parameters(), precision="compensated-8")  # type: ignore[call-arg]
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(UserError, match="torch.compile cannot trace.*choose master") as error:
        optimizer.step(lambda: compiled(x).float().sum())
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))
    with pytest.raises(AssertionError, match="mine"):
        optimizer.step(lambda: (_ for _ in ()).throw(AssertionError("mine")))
    compiled(x)
    master = METHODS["mezo"](compiled.named_parameters(), precision="master")  # type: ignore[call-arg]
    assert master.step(lambda: compiled(x).float().sum()) == pytest.approx(module(x).float().sum().item(), abs=0.5)


def test_a_compiled_model_gives_the_losses_of_the_same_model_uncompiled_or_is_refused():
    """Whether torch.compile can leave the substitution to the interpreter depends on its version."""
    losses = []
    for compile in (lambda module: module, lambda module: torch.compile(module, backend="eager")):
        module, x = model(torch.bfloat16)[1:], torch.ones(2, 48, dtype=torch.bfloat16)
        optimizer = METHODS["mezo"](module.named_parameters(), precision="compensated-8", check_loss=False)  # type: ignore[call-arg]
        run = compile(module)
        with suppress(UserError):
            losses.append(optimizer.step(lambda: run(x).float().sum()))
    assert len(losses) == 1 or losses[0] == losses[1]
