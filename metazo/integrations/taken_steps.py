"""The optimizer of a Trainer whose `training_step` takes the steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from metazo.errors import UserError
from metazo.optimizers.base import ZOOptimizer


class TakenSteps(Optimizer):
    """The optimizer that the Trainer sees: its `step()` does nothing, because `training_step` has taken the step.

    Args: optimizer; own: the parameters of a loss, which the Trainer's checkpoint of the model does not hold, by name.
    """

    def __init__(self, optimizer: ZOOptimizer, own: Mapping[str, nn.Parameter] | None = None):
        self.optimizer, self.taken, self.own = optimizer, optimizer.steps, dict(own or {})

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there before __init__, as in a copy
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def uncounted(self) -> bool:
        """Whether a step is taken after which the Trainer has not called `step()` yet."""
        return self.optimizer.steps != self.taken

    def step(self, closure: Any = None) -> Any:
        if not self.uncounted:
            raise UserError(
                "No step was taken: a subclass must not replace the `training_step` of ZOMixin, which takes it."
            )
        self.taken = self.optimizer.steps

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        own = {name: parameter.detach() for name, parameter in self.own.items()}
        return self.optimizer.state_dict() | ({"loss": own} if own else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        for name, value in state.pop("loss", {}).items():
            if name in self.own:  # of other tensors the method itself says so
                self.own[name].data.copy_(value)
        self.optimizer.load_state_dict(state)
        self.taken = self.optimizer.steps

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)
