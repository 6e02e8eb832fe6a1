"""pickle, torch.save and copy.deepcopy of every optimizer together with its model: the copy continues bit-identically."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from metazo.bench.architectures import build
from metazo.optimizers import METHODS, OPTIMIZERS, MeZO
from metazo.optimizers.answer_column import AnswerColumn
from metazo.optimizers.registry import load
from metazo.optimizers.skip_feedback import SkipFeedback
from tests.optimizers.contract import NAMES, case, make, quadratic, take

load()
LOSSES = sorted(name for name, cls in METHODS.items() if not cls.needs_model)


def saved(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair)), "torch.save": saved}
by = pytest.mark.parametrize("by", COPIES)


def begin(name: str, dtype: torch.dtype):
    problem = quadratic(dtype)
    if name in OPTIMIZERS:
        return problem, make(name, problem.named(), case(name).quadratic, seed=3)
    return problem, METHODS[name](problem.named(), lr=1e-3)  # type: ignore[call-arg]


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@by
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_copy_goes_on_bit_identically(name, precision, by):
    problem, optimizer = begin(name, getattr(torch, precision))
    for _ in range(3):
        take(optimizer, problem)
    optimizer.recorder = lambda step: None  # belongs to this process
    twin, other = COPIES[by]((problem, optimizer))
    assert other.recorder is None and equal(problem, twin)
    for _ in range(3):
        take(optimizer, problem)
    assert not equal(problem, twin), "the copy shares its weights with the original"
    for _ in range(3):
        take(other, twin)
    assert equal(problem, twin)
    assert (other.last_step, other.steps, other.forwards) == (optimizer.last_step, optimizer.steps, optimizer.forwards)


@by
@pytest.mark.parametrize("name,own", [*((name, {}) for name in NAMES), ("loren", {"compat": "official"})])
def test_a_copy_records_the_step_whose_record_failed(name, own, by):
    """It has what the step waits with, of its own: not the state of the original, which goes on."""

    def full(step):
        raise OSError("no space left on device")

    problem = quadratic(torch.bfloat16)
    optimizer = make(name, problem.named(), case(name).quadratic, seed=3, **own)
    take(optimizer, problem)
    optimizer.recorder = full
    with pytest.raises(OSError):
        take(optimizer, problem)
    optimizer.recorder = None
    twin, other = COPIES[by]((problem, optimizer))
    for _ in range(3):
        take(optimizer, problem)
    for _ in range(3):
        take(other, twin)
    assert equal(problem, twin) and other.last_step == optimizer.last_step


@by
@pytest.mark.parametrize("method", [AnswerColumn, SkipFeedback])
def test_a_copy_of_a_method_that_reads_the_modules(method, by):
    model = build("Llama").model
    ids = torch.arange(12).view(2, 6) % 7 + 3
    optimizer = method(model.named_parameters(), lr=1e-3, model=model)

    def loss_of(module):
        return lambda: torch.nn.functional.cross_entropy(module(input_ids=ids).logits[:, -1], ids[:, 0])

    optimizer.step(loss_of(model))
    twin, other = COPIES[by]((model, optimizer))
    optimizer.step(loss_of(model))
    assert not equal(model, twin)
    other.step(loss_of(twin))
    assert equal(model, twin)


@by
@pytest.mark.parametrize("precision", ["compensated-16", "compensated-8"])
def test_a_copy_keeps_the_bits_below_the_weights(precision, by):
    problem = quadratic(torch.bfloat16)
    optimizer = MeZO(problem.named(), lr=0.01, precision=precision)
    optimizer.step(problem)
    twin, other = COPIES[by]((problem, optimizer))
    optimizer.step(problem), other.step(twin)
    state, kept = optimizer.tensors_state(), other.tensors_state()
    assert equal(problem, twin) and all(torch.equal(state[key], kept[key]) for key in state)


@by
@pytest.mark.parametrize("precision", ["master", "compensated-16", "compensated-8"])
def test_a_copy_notices_weights_that_were_changed_since(precision, by):
    """Bits below zeros that are not theirs would be no numbers."""
    problem = quadratic(torch.bfloat16)
    optimizer = MeZO(problem.named(), lr=0.01, precision=precision)
    optimizer.step(problem)
    twin, other = COPIES[by]((problem, optimizer))
    for model in (problem, twin):
        with torch.no_grad():
            for weights in model.parameters():
                weights.zero_()
    for one, model in ((optimizer, problem), (other, twin)):
        with pytest.warns(UserWarning, match="were changed since the last step"):
            one.step(model)
    assert equal(problem, twin) and other.last_step == optimizer.last_step and other.last_step.coefficients


@by
@pytest.mark.parametrize("precision", ["compensated-16", "compensated-8"])
def test_a_copy_keeps_the_bits_if_the_same_weights_are_loaded_or_moved(precision, by):
    problem = quadratic(torch.bfloat16)
    optimizer = MeZO(problem.named(), lr=0.01, precision=precision)
    optimizer.step(problem)
    for move in (lambda twin: twin.load_state_dict(problem.state_dict()), lambda twin: twin.share_memory()):
        twin, other = COPIES[by]((problem, optimizer))
        move(twin)
        twin, other = COPIES[by]((twin, other))  # a copy of the copy
        move(twin)
        assert not any(place.follow() for place in other.weights.storage.values())
    optimizer.step(problem), other.step(twin)
    state, kept = optimizer.tensors_state(), other.tensors_state()
    assert equal(problem, twin) and all(torch.equal(state[key], kept[key]) for key in state)


@by
def test_a_copy_of_weights_that_were_changed_before_it_notices_it(by):
    problem = quadratic(torch.bfloat16)
    optimizer = MeZO(problem.named(), lr=0.01, precision="compensated-16")
    optimizer.step(problem)
    with torch.no_grad():
        for weights in problem.parameters():
            weights.zero_()
    twin, other = COPIES[by]((problem, optimizer))
    for one, model in ((optimizer, problem), (other, twin)):
        with pytest.warns(UserWarning, match="were changed since the last step"):
            one.step(model)
    assert equal(problem, twin) and other.last_step == optimizer.last_step and other.last_step.coefficients


def test_before_the_first_step_and_under_a_schedule():
    problem = quadratic(torch.float32)
    optimizer = MeZO(problem.named(), lr=0.05)
    schedule = LinearLR(optimizer, 0.5)
    twin, other = copy.deepcopy((problem, optimizer))
    for one, model in ((optimizer, problem), (other, twin)):
        one.step(model)
    assert equal(problem, twin) and other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    schedule.step()
    assert other.param_groups[0]["lr"] != optimizer.param_groups[0]["lr"]
