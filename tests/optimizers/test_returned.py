"""What methods and rules of one's own return, and what a step that fails leaves of their state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from metazo.errors import UserError
from metazo.optimizers.base import ZOOptimizer
from metazo.optimizers.registry import OPTIMIZERS, register
from metazo.step.directions import Isotropic, Sparse
from metazo.step.estimators import OneSided
from metazo.step.record import Step, Update
from metazo.step.rules import Rule
from metazo.step.scales import BlockScale
from metazo.step.terms import Term
from tests.optimizers.contract import make, quadratic, take


@pytest.mark.parametrize("size", [1e37, 1e160])
@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_step_that_is_refused_leaves_no_trace(name: str, rule: str, size: float) -> None:
    """The count of adam, the vector of loren and the snapshot of svrg were of a step that is not in the log."""
    if OPTIMIZERS[name].needs_model:
        pytest.skip("the contract's problems are no language models")
    options = {} if OPTIMIZERS[name].own_rule else {"rule": rule}
    ends = []
    for spike in (True, False):
        problem, records = quadratic(), list[Step]()
        optimizer = make(name, problem.named(), 1e-4, **options)
        optimizer.recorder, calls = records.append, [0]

        def high(problem=problem, calls=calls) -> torch.Tensor:
            calls[0] += 1
            return problem() + size * calls[0] ** 2

        for step in range(4):
            if spike and step in (2, 3):
                try:
                    take(optimizer, high)
                except UserError:
                    assert optimizer.steps == step and len(records) == step
                else:
                    return  # the method takes such losses
            take(optimizer, problem)
        ends.append([*problem.copies(), *optimizer.zo_state.values()])
    for one, other in zip(*ends):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)  # rounding, by way of networks of float32


class Returns(ZOOptimizer):
    """Four one-sided directions, and an update made of their coefficients by `form`."""

    name, estimator = "returns", OneSided(4)
    form: Callable[[Any], Any] = Update

    def update(self, state, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Any:
        return self.form(self.estimator.coefficients(losses, self.eps))


def test_coefficients_of_any_kind_of_number_are_recorded_and_applied_as_floats() -> None:
    """A generator was recorded and not applied; tensors and float32 of numpy ended in a TypeError at the log."""
    ends = []
    forms = (
        list,
        tuple,
        iter,
        np.array,
        lambda c: torch.tensor(c, dtype=torch.float64),
        lambda c: [torch.tensor(c[0]), *c[1:]],
    )
    for form in (*forms, lambda c: np.array(c, np.float32)):
        problem = quadratic()
        optimizer = Returns(problem.named(), lr=1e-2)
        optimizer.form = lambda found, form=form: Update(form(found))
        optimizer.step(problem)
        assert optimizer.last_step is not None
        assert len(json.loads(json.dumps(optimizer.last_step.to_dict()))["coefficients"]) == 4
        ends.append(problem.flat())
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (lambda c: Update(c[:2]), "`update` of returns returned 2 coefficients, and a step has 4 directions"),
        (lambda c: Update([9.0, *c]), "`update` of returns returned 5 coefficients, and a step has 4 directions"),
        (lambda c: Update([math.nan] * 4), "returned the coefficient nan, from losses of .* it must be finite"),
        (lambda c: Update([math.inf] * 4), "returned the coefficient inf, from losses of .* it must be finite"),
        (lambda c: Update(["a"] * 4), "`update` of returns must return an Update of numbers"),
        (lambda c: Update(0.5), "`update` of returns must return an Update of numbers"),  # type: ignore[arg-type]
        (lambda c: c, "`update` of returns must return an Update of numbers, not a list of 4"),
        (lambda c: None, "`update` of returns must return an Update of numbers, not None"),
    ],
)
def test_an_update_that_cannot_be_applied_is_refused(form, words: str) -> None:
    problem = quadratic()
    optimizer, before = Returns(problem.named(), lr=1e-2), problem.copies()
    optimizer.form = form
    with pytest.raises(UserError, match=words):
        optimizer.step(problem)
    assert all(torch.allclose(p, old, rtol=0, atol=1e-12) for p, old in zip(problem.parameters(), before))
    optimizer.form = Update
    optimizer.step(problem)
    assert optimizer.steps == 1


class Counts(ZOOptimizer):
    name, fails = "counts", False

    def init(self, tensors):
        return {"n": torch.zeros(())}

    def update(self, state, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        state["n"] += 1
        if self.fails:
            raise ArithmeticError("of the method")
        return Update(self.estimator.coefficients(losses, self.eps))


def test_after_a_failure_that_changed_the_state_a_saved_one_must_be_loaded() -> None:
    """The step was taken again on the state of the one that failed, and that state was saved."""
    problem = quadratic()
    optimizer = Counts(problem.named(), lr=1e-2)
    optimizer.step(problem)
    saved = optimizer.state_dict()
    optimizer.fails = True
    with pytest.raises(ArithmeticError, match="of the method"):
        optimizer.step(problem)
    optimizer.fails = False
    for call in (lambda: optimizer.step(problem), optimizer.state_dict):
        with pytest.raises(
            UserError, match=r"Step 1 of counts failed after it had changed the state, .* load a saved state"
        ):
            call()
    optimizer.load_state_dict(saved)
    optimizer.step(problem)
    assert optimizer.steps == 2 and optimizer.zo_state["n"] == 2


@pytest.mark.parametrize("fails", [KeyboardInterrupt, UserError])
def test_a_closure_that_fails_leaves_the_scales_as_they_were(fails: type[BaseException]) -> None:
    """A tuner's networks read their own scales of the step before, which were those of the step that failed."""
    ends = []
    for error in (None, fails):
        problem = quadratic()
        optimizer = make("zo-finetuner", problem.named(), 1e-3)
        for step in range(4):
            if error is not None and step == 2:

                def closure(error=error) -> float:
                    raise error

                with pytest.raises(error):
                    optimizer.step(closure)
            optimizer.step(problem)
        ends.append([problem.flat(), optimizer.zo_state["scale/sigma"]])
    for one, other in zip(*ends):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


class Probes(ZOOptimizer):
    """Probes and updates along a direction of its own, or along one around the given direction."""

    name, own, wraps = "probes", Isotropic(), False

    def displacements(self, estimator, direction, seeds):
        along = Sparse(direction, [tensor.name for tensor in self.tensors]) if self.wraps else self.own
        return [(Term(along, seeds[0], probe.multiple * self.eps),) for probe in estimator.probes()]

    def update(self, state, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        (c,) = self.estimator.coefficients(losses, self.eps)
        return Update([c], None if self.wraps else [Term(self.own, seeds[0], c)])


@pytest.mark.parametrize("wraps", [False, True])
def test_a_probe_of_ones_own_is_under_the_block_scale_once(wraps: bool) -> None:
    """The update was scaled and the probe was not."""
    ends = []
    for cls in (Probes, ZOOptimizer):
        problem, seen = quadratic(), []

        def closure(problem=problem, seen=seen) -> torch.Tensor:
            seen.append(problem.flat().detach())
            return problem()

        optimizer = cls(problem.named(), lr=1e-2, scale="rms", check_loss=False)
        if isinstance(optimizer, Probes):
            optimizer.wraps = wraps
        for _ in range(2):
            optimizer.step(closure)
        ends.append([*seen, problem.flat()])
    for one, other in zip(*ends):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Holds(ZOOptimizer):
    name, first, changed = "holds", {"h": torch.zeros(2)}, None

    def init(self, tensors):
        return dict(self.first)

    def update(self, state, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        if self.changed is not None:
            self.changed(state)
        return Update(self.estimator.coefficients(losses, self.eps))


@pytest.mark.parametrize(
    "name", ["counters", "probing", "shards", "master/w", "compensation/w", "adam_steps", "scale/sigma"]
)
def test_names_of_state_that_another_part_has_are_refused(name: str) -> None:
    """The one was overwritten with the other, and a resumed run went on from another state."""
    problem = quadratic()
    optimizer = Holds(problem.named(), lr=1e-2, rule="adam", scale="rms")
    optimizer.first = {name: torch.zeros(2)}
    with pytest.raises(UserError, match=f"`init` of (holds|the rule|the scale) names a tensor {name}, and"):
        optimizer.step(problem)


def test_state_that_is_no_tensor_is_refused() -> None:
    problem = quadratic()
    optimizer = Holds(problem.named(), lr=1e-2)
    optimizer.first = {"h": 0.5}  # type: ignore[dict-item]
    with pytest.raises(UserError, match="`init` of holds gives h as 0.5, a float: all state must be tensors"):
        optimizer.step(problem)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            lambda state: state.update(h=torch.zeros(3)),
            r"h is a tensor of shape \(3,\) .* gave a tensor of shape \(2,\)",
        ),
        (lambda state: state.update(h=torch.zeros(2).double()), "h is a tensor of shape .*float64 after .*float32"),
        (lambda state: state.update(h=0.5), "h is 0.5, a float after a step"),
        (lambda state: state.update(new=torch.zeros(())), "new is a tensor .* and `init` gave none"),
        (lambda state: state.pop("h"), "h is gone after a step"),
    ],
)
def test_state_that_loses_the_form_of_init_is_refused(changed, words: str) -> None:
    """It was noticed when the saved state was loaded."""
    problem = quadratic()
    optimizer = Holds(problem.named(), lr=1e-2)
    optimizer.changed = changed
    with pytest.raises(UserError, match=f"The state {words}"):
        optimizer.step(problem)
    later = Holds(problem.named(), lr=1e-2)
    later.step(problem)
    later.changed = changed
    later.step(problem)
    with pytest.raises(UserError, match=f"The state {words}"):
        later.state_dict()


class Sign(Rule):
    fused = False

    def apply(self, tensor, start, theta, add, lr, decay, state) -> None:
        gradient = torch.zeros_like(theta)
        add(gradient, 1.0, 0.0)
        theta.sub_(gradient.sign(), alpha=lr)


def test_a_fused_rule_with_an_apply_is_refused() -> None:
    """Its `apply` was never called, and the step was plain descent."""
    problem = quadratic()
    before = problem.flat().detach()
    OPTIMIZERS["mezo"](problem.named(), lr=1e-2, rule=Sign()).step(problem)
    torch.testing.assert_close((problem.flat() - before).abs(), torch.full((15,), 1e-2).double())
    for attributes, words in (
        ({"fused": True}, "is fused and has an `apply`"),
        ({"apply": Rule.apply}, "has no `apply`"),
    ):
        rule = type("Own", (Sign,), attributes)()
        with pytest.raises(UserError, match=f"`rule` Own .*{words}.*: set `fused` for plain descent"):
            OPTIMIZERS["mezo"](problem.named(), rule=rule)


def test_classes_that_cannot_be_registered_are_refused() -> None:
    """One without a name took that of the base, and one without **common ended in a TypeError at the first run."""

    class Bare(ZOOptimizer):
        name = "bare"

        def __init__(self, params, lr: float = 1e-4, eps: float = 1e-3):
            super().__init__(params, lr, eps)

    with pytest.raises(UserError, match="Nameless has no name; give the class an attribute `name`"):
        register(type("Nameless", (ZOOptimizer,), {}))
    with pytest.raises(
        UserError, match=r"The constructor of Bare does not take .*seed.*: let it take \*\*common, and pass it"
    ):
        register(Bare)


def test_a_direction_that_cannot_be_hashed_is_named() -> None:
    """It was a TypeError: unhashable type."""

    class Half(Isotropic):
        pass

    for hashed in (False, True):
        problem = quadratic()
        optimizer = Returns(problem.named(), lr=1e-2)
        direction = dataclass(frozen=hashed)(Half)()
        optimizer.propose = lambda state, step, seeds, direction=direction: direction
        if hashed:
            optimizer.step(problem)
        else:
            with pytest.raises(UserError, match=r"The direction Half cannot be hashed, .* @dataclass\(frozen=True"):
                optimizer.step(problem)


@pytest.mark.parametrize("count", [1, 3])
def test_a_scale_with_another_number_of_blocks_is_refused(count: int) -> None:
    """One number for all blocks was a KeyError of a tensor's name."""

    class Same(BlockScale):
        def sigma(self, state):
            return torch.ones(count)

    problem = quadratic()
    with pytest.raises(UserError, match=rf"`sigma` of Same has the shape \({count},\), and there are 2 blocks"):
        OPTIMIZERS["mezo"](problem.named(), scale=Same()).step(problem)
