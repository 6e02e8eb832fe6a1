"""Rules: what is done with the gradient estimate g. SGD adds it as it is regenerated, momentum to its buffer; Adam
needs its square, and makes it a piece of a tensor at a time. So the extra memory is the buffers, float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, part
from metazo.errors import UserError

State = dict[str, Tensor]
Add = Callable[[Tensor, float, float], None]
"""add(out, alpha, beta): out = beta * out + alpha * g, in place, on the piece at hand; to be called once."""


class Rule(Protocol):
    @property
    def fused(self) -> bool:
        """True: the rule keeps no buffer, so the update regenerates g in place."""
        ...

    def init(self, tensors: Sequence[NamedTensor]) -> State: ...
    def apply(
        self, tensor: NamedTensor, start: int, theta: Tensor, add: Add, lr: float, decay: float, state: State
    ) -> None:
        """theta <- one step, in place, on a piece of a tensor (from entry `start`; or the whole, in its shape).

        add: puts the estimate there; decay: lr * weight_decay for this tensor, 0 where it is exempt.
        """
        ...


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
class SGD:
    """theta <- theta - lr (g + weight_decay theta)."""

    fused = True

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        return {}

    def apply(self, tensor, start, theta, add, lr, decay, state) -> None:
        add(theta, -lr, 1 - decay)


@dataclass(frozen=True)
class Momentum:
    """torch's SGD with momentum: b <- mu b + g (b = g first, which zeros give as well), theta <- theta - lr b."""

    momentum: float = 0.9
    fused = False

    def __post_init__(self):
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum must lie in [0, 1), not {self.momentum}.")

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        return _buffers(tensors, "momentum")

    def apply(self, tensor, start, theta, add, lr, decay, state) -> None:
        buffer = part(state[f"momentum/{tensor.name}"], start, theta)
        add(buffer, 1.0, self.momentum)
        theta.mul_(1 - decay).sub_(buffer, alpha=lr)


@dataclass(frozen=True)
class Adam:
    """AdamW (Loshchilov and Hutter 2019): m, v with bias correction, decay apart from the gradient."""

    betas: tuple[float, float] = (0.9, 0.999)
    stability: float = 1e-8
    fused = False

    def __post_init__(self):
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas must lie in [0, 1), not {self.betas}.")

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        return _buffers(tensors, "first_moment", "second_moment") | {"adam_steps": torch.zeros((), dtype=torch.float64)}

    def apply(self, tensor, start, theta, add, lr, decay, state) -> None:
        first, second = self.betas
        gradient = torch.zeros_like(theta)
        add(gradient, 1.0, 1.0)
        m = part(state[f"first_moment/{tensor.name}"], start, theta).lerp_(gradient, 1 - first)
        v = part(state[f"second_moment/{tensor.name}"], start, theta)
        v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        count = float(state["adam_steps"])
        spread = torch.div(v, 1 - second**count, out=gradient).sqrt_().add_(self.stability)
        theta.mul_(1 - decay).addcdiv_(m, spread, value=-lr / (1 - first**count))


RULES = {"sgd": SGD, "momentum": Momentum, "adam": Adam}
