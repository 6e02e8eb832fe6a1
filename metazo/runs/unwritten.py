"""A run that writes nothing: the folder and the step log in memory, with the methods of RunFolder and StepLog."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from metazo.step.record import Step


class MemoryFolder:
    """Keeps the best weights in memory; settings, metrics, snapshots and model are not written."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.kept: dict[str, tuple[int, dict[str, Tensor]]] = {}

    def __enter__(self) -> MemoryFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kept.clear()

    def summary(self) -> None:
        return None

    def used(self) -> int:
        return 0

    def begin(self) -> None: ...

    def records(self) -> list[dict[str, Any]]:
        return []

    def keep_records(self, records: list[dict[str, Any]]) -> None: ...

    def record(self, **values: Any) -> None: ...

    def save_tensors(self, name: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        self.kept[name] = step, {key: tensor.detach().clone() for key, tensor in tensors.items()}

    def load_tensors(self, name: str) -> tuple[int, dict[str, Tensor]] | None:
        return self.kept.get(name)

    def step_of(self, name: str) -> int | None:
        return self.kept[name][0] if name in self.kept else None

    def remove(self, *patterns: str) -> None:
        for pattern in patterns:
            self.kept.pop(pattern, None)

    def save_snapshot(self, step: int, tensors: Mapping[str, Tensor]) -> None: ...

    def load_snapshot(self, at_most: int) -> None:
        return None

    def save_model(self, *parts: Any) -> None: ...

    def complete(self, summary: dict[str, Any]) -> None: ...


class MemoryLog:
    """The steps of a run in a list."""

    path = None

    def __init__(self) -> None:
        self.steps: list[Step] = []

    @property
    def count(self) -> int:
        return len(self.steps)

    def append(self, step: Step) -> None:
        self.steps.append(step)

    def sync(self) -> None: ...

    def cut(self, count: int) -> None:
        del self.steps[count:]

    def finish(self, kept: int, weights: str | None) -> None: ...

    def close(self) -> None: ...
