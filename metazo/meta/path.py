"""The weights and the batch of each meta-step: along a teacher that is trained at the same time, without a recording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.meta.gradient import Loss
from metazo.meta.order import Order
from metazo.meta.reset import Start, due
from metazo.meta.teacher import Teacher


class Path(Protocol):
    """The weights along a teacher's path."""

    def begin(self, step: int) -> bool:
        """Set the weights of this step. Returns: whether they jumped, instead of moving by one teacher step."""
        ...

    def restarts(self, step: int) -> bool:
        """Whether the path starts anew at this step."""
        ...

    def batch(self, step: int) -> tuple[int, list[int]]:
        """Task and examples."""
        ...

    def advance(self, loss: Loss) -> float | None:
        """Move to the next step. Returns the teacher's loss, if there is a teacher."""
        ...

    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: dict[str, Tensor]) -> None: ...


class Online:
    """A teacher that steps after every meta-step.

    Args: every: meta-steps between restarts (0: never), at which the schedule of the teacher's rate starts anew;
    restart_model: whether they also reset the weights and the teacher's momentum.
    """

    def __init__(self, start: Start, teacher: Teacher, order: Order, every: int, restart_model: bool = True):
        self.start, self.teacher, self.order, self.every = start, teacher, order, every
        self.restart_model = restart_model

    def begin(self, step: int) -> bool:
        if not self.restarts(step):
            return False
        if not self.restart_model:
            self.teacher.taken = 0  # its rate has fallen to 0, at which it would stay
            return False
        self.start.restore()
        self.teacher.restart()
        return True

    def restarts(self, step: int) -> bool:
        return due(step, self.every)

    def batch(self, step: int) -> tuple[int, list[int]]:
        return self.order.batch(step)

    def advance(self, loss: Loss) -> float | None:
        return self.teacher.step(loss)

    def state(self) -> dict[str, Tensor]:
        return weights_of(self.teacher.tensors) | {f"teacher/{k}": v for k, v in self.teacher.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        if 0 < self.every < (taken := int(state["teacher/taken"])):
            raise UserError(
                f"The snapshot's teacher has taken {taken} steps since its rate last started anew, which it does every "
                f"{self.every} steps (`restart_every`), and did not in an earlier version of metazo: start in another `out`."
            )
        load_weights(self.teacher.tensors, state)
        self.teacher.load({k.removeprefix("teacher/"): v for k, v in state.items() if k.startswith("teacher/")})


def weights_of(tensors: Sequence[NamedTensor]) -> dict[str, Tensor]:
    """The weights as `theta/<name>`, not copied."""
    return {f"theta/{tensor.name}": tensor.param.detach() for tensor in tensors}


def load_weights(tensors: Sequence[NamedTensor], state: dict[str, Tensor]) -> None:
    for tensor in tensors:
        tensor.param.data.copy_(state[f"theta/{tensor.name}"])
