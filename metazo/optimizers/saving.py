"""How the state of an optimizer is stored: as tensors by name, and in torch's form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from metazo.errors import UserError
from metazo.optimizers.verbs import State
from metazo.step.weights import Weights


class Saving(Optimizer):
    """`tensors_state` and `state_dict` of ZOOptimizer, and their counterparts."""

    name: str
    steps: int
    forwards: int
    weights: Weights
    zo_state: State
    settle: Callable[[], None]
    _prepare: Callable[[], None]

    def tensors_state(self) -> State:
        """All state as tensors by name, masters and compensation included, ready to be stored as safetensors."""
        self._prepare()
        self.settle()
        counters = torch.tensor([self.steps, self.forwards], dtype=torch.int64)
        storage = self.weights.storage.items()
        kept = {f"{kind}/{name}": value for name, stored in storage for kind, value in stored.buffers.items()}
        return self.zo_state | kept | {"counters": counters}

    def load_tensors_state(self, state: State) -> None:
        """Load a `tensors_state`. Raises UserError if names or shapes are not those of this optimizer."""
        self._prepare()
        present = self.tensors_state()
        if {k: v.shape for k, v in present.items()} != {k: v.shape for k, v in state.items()}:
            odd = sorted(set(present) ^ set(state)) or ["a shape"]
            raise UserError(
                f"The saved state is not of this optimizer ({self.name}): {odd[0]} differs. Load it into the method and model "
                "that saved it."
            )
        for name, value in present.items():
            value.copy_(state[name])
        self.steps, self.forwards = (int(n) for n in state["counters"])

    def state_dict(self) -> dict[str, Any]:
        """State in torch's form. The method's tensors are under "zo", so that torch does not cast them to the weights' type."""
        return super().state_dict() | {"zo": {k: v.clone() for k, v in self.tensors_state().items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zo"})
        self.load_tensors_state(state_dict["zo"])
