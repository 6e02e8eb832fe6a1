"""The first-order teacher: the tuner is trained along its path.

Published (arXiv 2510.00419, trainer_l2l.py): SGD with momentum 0.8, gradients clipped to norm 1, learning rate linear
to 0 over the steps between two restarts. AdamW is available as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.meta.gradient import Loss

TEACHERS = ("sgd", "adamw")


class Teacher:
    """Steps the weights by backpropagation.

    Args:
        tensors: the tensors to train.
        kind: "sgd" or "adamw" (betas 0.9 and 0.999, weight decay 0).
        lr: at the first step; falls linearly to 0 over `steps`.
        clip: largest norm of the gradient over all tensors.
    """

    def __init__(
        self,
        tensors: Sequence[NamedTensor],
        kind: str = "sgd",
        *,
        lr: float,
        steps: int,
        momentum: float = 0.8,
        clip: float = 1.0,
    ):
        if kind not in TEACHERS:
            raise UserError(f"teacher {kind!r} is unknown: choose {' or '.join(TEACHERS)}.")
        self.tensors, self.kind, self.lr, self.steps = tensors, kind, lr, steps
        self.momentum, self.clip = momentum, clip
        self.restart()

    def restart(self) -> None:
        """Reset the momentum and start the schedule anew."""
        params = [tensor.param for tensor in self.tensors]
        if self.kind == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(params, lr=self.lr, momentum=self.momentum)
        else:
            self.optimizer = torch.optim.AdamW(params, lr=self.lr, weight_decay=0.0)
        self.taken = 0

    def rate(self) -> float:
        """Learning rate of the next step."""
        return self.lr * max(0.0, 1 - self.taken / self.steps)

    def step(self, loss: Loss) -> float:
        """One step on `loss`. Returns the loss before it; if the loss or its gradient is not finite, no weight changes."""
        params = [tensor.param for tensor in self.tensors]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            value = loss()
        result = float(value.detach())
        if math.isfinite(result):
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_(params, self.clip)
            if math.isfinite(float(norm)):
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate()
                self.optimizer.step()
            else:
                result = math.nan
        self.optimizer.zero_grad(set_to_none=True)
        self.taken += 1
        return result

    def state(self) -> dict[str, Tensor]:
        """Momentum or moments by tensor, and the number of steps taken, as `load` reads them."""
        out = optimizer_tensors(self.optimizer, [tensor.name for tensor in self.tensors])
        return out | {"taken": torch.tensor(self.taken)}

    def load(self, state: dict[str, Tensor]) -> None:
        self.restart()
        load_optimizer_tensors(self.optimizer, [tensor.name for tensor in self.tensors], state)
        self.taken = int(state["taken"])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """State of an optimizer of one group as `<parameter>:<key>` -> tensor, not copied."""
    params = optimizer.param_groups[0]["params"]
    return {
        f"{name}:{key}": value
        for name, param in zip(names, params, strict=True)
        for key, value in optimizer.state[param].items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str], state: dict[str, Tensor]) -> None:
    """Load the tensors that `optimizer_tensors` returned."""
    params = dict(zip(names, optimizer.param_groups[0]["params"], strict=True))
    for key, value in state.items():
        name, _, field = key.rpartition(":")
        if name in params:
            optimizer.state[params[name]][field] = value.clone()
