"""First-order baselines under the same loop: SGD and AdamW by backpropagation, for comparison.

A step is one forward and one backward pass, counted as three forward passes (a backward pass costs about two), so that
curves over forward passes stay fair. Memory is what zeroth-order methods avoid: gradients, moments and activations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from metazo.errors import UserError
from metazo.optimizers.base import DECAY_EXEMPT
from metazo.step.record import Step

FORWARDS_PER_STEP = 3
RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "first-order-adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
    "first-order-sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9),
}


class FirstOrder:
    """torch's AdamW or SGD with momentum .9, with gradients clipped to norm 1, seen through the loop's eyes.

    Args: name: a key of RULES; named parameters; lr; weight_decay under MeZO's name rule; clip: largest gradient norm.
    """

    def __init__(
        self,
        name: str,
        params: Iterable[tuple[str, Tensor]],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        clip: float = 1.0,
    ):
        named = [(key, param) for key, param in params if param.requires_grad]
        if not named:
            raise UserError("No tensor is trainable: every parameter is frozen.")
        exempt = [param for key, param in named if any(part in key for part in DECAY_EXEMPT)]
        decayed = [param for key, param in named if not any(part in key for part in DECAY_EXEMPT)]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
        self.name, self.named, self.clip = name, named, clip
        self.inner = RULES[name]([group for group in groups if group["params"]], lr=lr)
        self.steps = self.forwards = 0
        self.energy = 1.0
        self.last_step: Step | None = None
        self.max_loss = sys.float_info.max

    def forwards_per_step(self, closures: int = 1) -> float:
        return FORWARDS_PER_STEP * closures

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def step(self, closure: Callable[[], Tensor] | Sequence[Callable[[], Tensor]]) -> float:
        """One update; closures are averaged. A loss that is not finite changes nothing."""
        closures = [closure] if callable(closure) else list(closure)
        total = 0.0
        with torch.enable_grad():
            for evaluate in closures:
                loss = evaluate() / len(closures)
                loss.backward()
                total += float(loss.detach())
        self.forwards += FORWARDS_PER_STEP * len(closures)
        finite = abs(total) <= self.max_loss  # false for nan
        if finite:
            torch.nn.utils.clip_grad_norm_([param for _, param in self.named], self.clip)
            self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        rates = tuple(float(group["lr"]) for group in self.param_groups)
        self.last_step = Step(self.steps, (), (total,), (1.0,) if finite else (), rates)
        self.steps += 1
        return total

    def tensors_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {"counters": torch.tensor([self.steps, self.forwards], dtype=torch.int64)}
        for name, param in self.named:
            for key, value in self.inner.state.get(param, {}).items():
                if value is not None:
                    state[f"{key}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return state

    def load_tensors_state(self, state: dict[str, Tensor]) -> None:
        self.steps, self.forwards = (int(n) for n in state["counters"])
        params = dict(self.named)
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if name in params:
                self.inner.state[params[name]][kind] = value.clone()


def trainable_count(named: Iterable[tuple[str, Tensor]]) -> int:
    """Entries of the trainable tensors, tied ones once."""
    return sum({id(p): p.numel() for _, p in chain(named) if p.requires_grad}.values())
