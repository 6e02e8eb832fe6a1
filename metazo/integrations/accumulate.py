"""Gradient accumulation in a loop of accelerate's, for steps that have no gradient to accumulate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metazo.optimizers.base import ZOOptimizer


class Accumulated:
    """An optimizer for `accelerator.accumulate`: it takes one step per accumulation, over the mean loss of its micro-batches.

        optimizer = Accumulated(accelerator, metazo.MeZO(model.named_parameters(), lr=1e-6))
        for batch in loader:
            with accelerator.accumulate(model):
                loss = optimizer.step(lambda batch=batch: model(**batch).loss)      # None until the last micro-batch

    An optimizer that `accelerator.prepare` has wrapped skips the closures of all micro-batches but the last one of an
    accumulation, without a word; this one keeps them. Do not give it to `accelerator.prepare`. The closure is called after
    later micro-batches were drawn: bind the batch, as above. If a loop is left within an accumulation, accelerate goes on
    counting in the next one, and what was kept is part of its first step, as gradients would be; loading a state drops it.

    Args: accelerator, whose `sync_gradients` says which micro-batch is the last one; optimizer.
    """

    def __init__(self, accelerator: Any, optimizer: ZOOptimizer):
        self.accelerator, self.optimizer = accelerator, optimizer
        self._closures: list[Callable[[], Any]] = []

    def step(self, closure: Callable[[], Any]) -> float | None:
        """Keep the closure; with the last one, take the step. Returns: the step's loss, None if no step is taken."""
        self._closures.append(closure)
        if not self.accelerator.sync_gradients:
            return None
        closures, self._closures = self._closures, []
        return self.optimizer.step(closures)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """There are no gradients; loops call it all the same."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)
        self._closures = []  # as in a new process
