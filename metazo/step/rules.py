"""Rules: how the gradient estimate g changes the weights. SGD adds g to the weights as it is regenerated, momentum adds it
to a buffer, and Adam, which needs its square, makes g one chunk of a tensor at a time. The extra memory is therefore the
buffers alone, in float32 or wider.

`begin` is called once per step, before any weight changes. The number that it returns scales the whole update, so that a
rule without buffers can choose the length of the step (MEAZO) and the update is still regenerated in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, chunk_of
from metazo.errors import UserError

State = dict[str, Tensor]
Add = Callable[[Tensor, float, float], None]
"""add(out, alpha, beta): out = beta * out + alpha * g, in place, on the current chunk; to be called once."""


class Rule:
    fused = False
    """True: the rule is theta <- (1 - decay) theta - lr f g with the factor f of `begin`, regenerates g in place, and has no
    `apply` of its own."""
    divides = False
    """True: the rule divides by the sum of the coefficients, so that it must not be 0 by construction."""

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        return {}

    def begin(self, state: State, coefficients: Sequence[float]) -> float:
        """Once per step, before its record, with the coefficients of its estimate. Returns: the factor of the update."""
        return 1.0

    def apply(
        self, tensor: NamedTensor, start: int, theta: Tensor, add: Add, lr: float, decay: float, state: State
    ) -> None:
        """One step of theta, in place, on a chunk of a tensor (from entry `start`) or on the whole tensor in its shape: plain
        descent, which a fused rule keeps.

        add: adds the estimate to a tensor; decay: lr * weight_decay for this tensor, 0 if it is exempt.
        """
        add(theta, -lr, 1 - decay)


def _buffers(tensors: Sequence[NamedTensor], *names: str) -> State:
    return {
        f"{name}/{tensor.name}": torch.zeros(
            tensor.param.shape,
            dtype=torch.promote_types(tensor.param.dtype, torch.float32),
            device=tensor.param.device,
        )
        for name in names
        for tensor in tensors
    }


@dataclass(frozen=True)
class SGD(Rule):
    """theta <- theta - lr (g + weight_decay theta)."""

    fused = True


@dataclass(frozen=True)
class Momentum(Rule):
    """torch's SGD with momentum: b <- mu b + g (b starts at zeros, so that b = g first), theta <- theta - lr b."""

    momentum: float = 0.9

    def __post_init__(self):
        if not 0 <= self.momentum < 1:
            raise UserError(f"`momentum` must be in [0, 1), not {self.momentum}.")

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        return _buffers(tensors, "momentum")

    def apply(self, tensor, start, theta, add, lr, decay, state) -> None:
        buffer = chunk_of(state[f"momentum/{tensor.name}"], start, theta)
        add(buffer, 1.0, self.momentum)
        theta.mul_(1 - decay).sub_(buffer, alpha=lr)


@dataclass(frozen=True)
class Adam(Rule):
    """AdamW (Loshchilov and Hutter 2019): m, v with bias correction, and decoupled weight decay."""

    betas: tuple[float, float] = (0.9, 0.999)
    stability: float = 1e-8

    def __post_init__(self):
        try:
            first, second = map(float, self.betas)
        except (TypeError, ValueError):
            first = second = math.nan
        if not (0 <= first < 1 and 0 <= second < 1):
            raise UserError(f"`betas` must be two numbers of at least 0 and below 1, not {self.betas}.")
        object.__setattr__(self, "betas", (first, second))
        if not 0 < self.stability < math.inf:
            raise UserError(f"`stability` must be a finite number above 0, not {self.stability}.")

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        return _buffers(tensors, "first_moment", "second_moment") | {"adam_steps": torch.zeros((), dtype=torch.float64)}

    def begin(self, state: State, coefficients: Sequence[float]) -> float:
        state["adam_steps"] += 1
        return 1.0

    def apply(self, tensor, start, theta, add, lr, decay, state) -> None:
        first, second = self.betas
        m = chunk_of(state[f"first_moment/{tensor.name}"], start, theta)
        gradient = torch.zeros_like(m)
        add(gradient, 1.0, 1.0)
        m.lerp_(gradient, 1 - first)
        v = chunk_of(state[f"second_moment/{tensor.name}"], start, theta)
        v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        count = float(state["adam_steps"])
        spread = torch.div(v, 1 - second**count, out=gradient).sqrt_().add_(self.stability)
        theta.mul_(1 - decay).addcdiv_(m, spread, value=-lr / (1 - first**count))


@dataclass(frozen=True)
class ScalarMoment(Rule):
    """theta <- theta - lr (g / (sqrt(v) + stability) + weight_decay theta), with one number v of state (MEAZO).

    v is the bias-corrected moving average of (sum of the step's coefficients)^2. The coefficients of an average over q
    directions are divided by q already, so their sum is the mean projected gradient.
    """

    beta: float = 0.999
    stability: float = 1e-8
    fused = True
    divides = True

    def __post_init__(self):
        if not 0 <= self.beta < 1:
            raise UserError(f"`beta` must be at least 0 and below 1, not {self.beta}.")
        if not 0 < self.stability < math.inf:
            raise UserError(f"`stability` must be a finite number above 0, not {self.stability}.")

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        return {
            "meazo/moment": torch.zeros((), dtype=torch.float64),
            "meazo/steps": torch.zeros((), dtype=torch.int64),
        }

    def begin(self, state: State, coefficients: Sequence[float]) -> float:
        moment, steps = state["meazo/moment"], state["meazo/steps"]
        moment.fill_(self.beta * float(moment) + (1 - self.beta) * math.fsum(coefficients) ** 2)
        steps += 1
        return 1 / (math.sqrt(float(moment) / (1 - self.beta ** int(steps))) + self.stability)


RULES = {"sgd": SGD, "momentum": Momentum, "adam": Adam, "meazo": ScalarMoment}


def check_rule(rule: Any) -> None:
    """Raises UserError for what is no rule, for a fused one whose `apply` would not be called, and for one that has neither."""
    if not isinstance(rule, Rule):
        raise UserError(f"`rule` {rule!r} is no rule: name one, or pass an instance of one of metazo.step.rules.")
    own = type(rule).apply is not Rule.apply
    if rule.fused == own:
        found = "is fused and has an `apply`, which would not be called" if own else "is not fused and has no `apply`"
        raise UserError(
            f"`rule` {type(rule).__name__} {found}: set `fused` for plain descent by the factor of `begin`, and write `apply` "
            "for any other."
        )


def named_rule(name: str) -> Rule:
    """The rule of this name with its usual hyperparameters. Raises UserError for an unknown name."""
    if name not in RULES:
        raise UserError(f"`rule` {name!r} is unknown: choose {', '.join(RULES)}, or pass a Rule.")
    return RULES[name]()
