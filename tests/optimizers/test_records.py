"""Records of steps that are replayed, retried or refused: nothing is taken that the record does not say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from metazo.errors import UserError
from metazo.optimizers import CurvZO, HiZOO, MeZO, ZOOptimizer
from metazo.step.record import Step


def made(cls: Any = MeZO, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[torch.nn.Linear, ZOOptimizer]:
    model = torch.nn.Linear(8, 64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for weights in model.parameters():
            weights.data.normal_(0, 0.3)
    model = model.to(dtype)
    return model, cls(model.named_parameters(), lr=1e-2, check_loss=False, **options)


def loss_of(model: torch.nn.Linear) -> Any:
    x = torch.linspace(-1, 1, 24).view(3, 8).to(model.weight.dtype)
    return lambda: model(x).float().square().mean()


def records(**options: Any) -> list[Step]:
    model, optimizer = made(**options)
    found: list[Step] = []
    optimizer.recorder = found.append
    for _ in range(3):
        optimizer.step(loss_of(model))
    return found


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_no_limit_of_losses_takes_no_loss_that_is_not_finite(loss: float) -> None:
    model, optimizer = made(dtype=torch.bfloat16)
    optimizer.max_loss = math.inf
    before = model.weight.detach().clone()
    found = optimizer.step(lambda: loss)
    assert not math.isfinite(found) and torch.equal(model.weight, before)
    assert optimizer.last_step is not None and optimizer.last_step.coefficients == ()


def test_a_record_of_another_step_is_refused() -> None:
    two_groups: Any = [{"params": [(name, p)]} for name, p in made()[0].named_parameters()]
    for record, optimizer, words in (
        (records()[1], made()[1], "Step 1 of the log cannot be replayed as step 0: replay all, in order"),
        (records()[0], made(eps=1e-2)[1], "Step 0 of the log cannot be reproduced: its coefficients are"),
        (records(queries=2)[0], made()[1], "has 2 seeds and 4 losses, and a step of mezo takes 1 and 2"),
        (records()[0], MeZO(two_groups, lr=1e-2), "Step 0 of the log .* is of another number of parameter groups"),
    ):
        before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        with pytest.raises(UserError, match=words):
            optimizer.step(replay=record)
        after = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(torch.allclose(p, old, rtol=0, atol=1e-6) for p, old in zip(after, before)) and optimizer.steps == 0


@pytest.mark.parametrize(("cls", "losses"), [(HiZOO, [1.0, 3e38, 2.0]), (CurvZO, [1e20, -1e20])])
def test_a_loss_beyond_what_the_state_can_hold_is_refused(cls: Any, losses: list[float]) -> None:
    model, optimizer = made(cls)
    before, values = model.weight.detach().clone(), iter(losses)
    with pytest.raises(UserError, match="too far apart for the squares"):
        optimizer.step(lambda: next(values))
    assert torch.allclose(model.weight, before, rtol=0, atol=1e-6)
    assert all(value.isfinite().all() for value in optimizer.zo_state.values())


@pytest.mark.parametrize("precision", ["master", "compensated-8"])
def test_a_step_that_is_recorded_at_the_second_attempt_is_the_same(precision: str) -> None:
    found = []
    for fails in (False, True):
        model, optimizer = made(dtype=torch.bfloat16, precision=precision, queries=3)
        taken: list[int] = []

        def record(step: Step, fails: bool = fails, taken: list[int] = taken) -> None:
            taken.append(step.step)
            if fails and taken.count(step.step) == 1:
                raise OSError("no space left on device")

        optimizer.recorder = record
        for _ in range(10):
            if fails:
                with pytest.raises(OSError, match="no space"):
                    optimizer.step(loss_of(model))
            optimizer.step(loss_of(model))
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found))
