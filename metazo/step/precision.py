"""How theta is stored while it is probed and updated: the policies of `precision`.

In place, a probe is added to the weights and taken off again. In float32 that drifts by 2e-6 of the weights' rms in 1,000
steps; in bfloat16 it replaces the model by noise (12 %, at learning rate 0). So weights narrower than float32
are never perturbed in place: theta is a float32 master of which the weights are the rounding, or the weights together with
the bits that they lost, and then a probe is seen through a scratch copy (metazo/step/substitute.py).
benchmarks/precision.py measures each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.kernels.splitfloat import LAYOUTS, join, split


@dataclass(frozen=True)
class Policy:
    """bytes: per weight, beside the weights; note: for people."""

    bytes: int
    note: str


POLICIES = {
    "in-place": Policy(0, "weights perturbed in place"),
    "master": Policy(4, "float32 master, weights its rounding"),
    "compensated-16": Policy(2, "weights and 16 bits below them, probed through a scratch copy of one tensor"),
    "compensated-8": Policy(1, "weights and 8 bits below them, stochastically rounded, probed as compensated-16"),
    "autocast": Policy(0, "float32 weights perturbed in place, forward in bfloat16"),
}
DEFAULTS = {
    torch.float64: "in-place",
    torch.float32: "in-place",
    torch.bfloat16: "master",
    torch.float16: "master",
}
PRECISIONS = ("auto", *POLICIES)


def policy(precision: str, dtype: torch.dtype) -> str:
    """The policy of a tensor of that dtype: compensation is for narrow ones, those beside them stay in place.

    Raises UserError if the two do not go together.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is unknown: choose {', '.join(PRECISIONS)}.")
    if precision == "auto":
        return DEFAULTS.get(dtype, "master")
    if precision == "autocast" and dtype != torch.float32:
        raise UserError(f"precision autocast is for float32 weights, and these are {dtype}: choose master.")
    if precision.startswith("compensated") and dtype not in LAYOUTS:
        return "in-place"
    return precision


def cost(precision: str, params: Iterable[Tensor]) -> tuple[str, int]:
    """What a precision means for these weights, in words, and the bytes that it takes beside them."""
    counts: Counter[str] = Counter()
    for param in params:
        counts[policy(precision, param.dtype)] += param.numel()
    words = [f"{name} ({POLICIES[name].note}; {POLICIES[name].bytes} B per weight more)" for name in counts]
    return ", ".join(words), sum(POLICIES[name].bytes * count for name, count in counts.items())


class Storage(Protocol):
    """How theta of one tensor is stored."""

    buffers: dict[str, Tensor]
    """What it keeps beside the weights, saved with the optimizer's state."""

    @property
    def theta(self) -> Tensor | None:
        """Theta as one tensor that may be changed in place, or None if it exists chunk by chunk only."""
        ...

    def read(self, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        """A flat run of theta, float32 at least; to be given to `write` after a change in place.

        room: memory for it, float32, if it has none of its own.
        """
        ...

    def write(self, start: int, chunk: Tensor, seed: int) -> None: ...

    def settle(self) -> None:
        """After theta was changed in place: bring the weights up to date."""
        ...


class InPlace:
    """Theta is the weights."""

    def __init__(self, tensor: NamedTensor):
        self.param, self.buffers = tensor.param, {}

    @property
    def theta(self) -> Tensor:
        return self.param.data

    def read(self, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        return self.param.data.view(-1)[start:stop]

    def write(self, start: int, chunk: Tensor, seed: int) -> None:
        pass

    def settle(self) -> None:
        pass


class Master:
    """Theta in float32; the weights are its rounding."""

    def __init__(self, tensor: NamedTensor):
        self.param = tensor.param
        self.buffers = {"master": tensor.param.detach().to(torch.float32, copy=True)}

    @property
    def theta(self) -> Tensor:
        return self.buffers["master"]

    def read(self, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        return self.theta.view(-1)[start:stop]

    def write(self, start: int, chunk: Tensor, seed: int) -> None:
        self.param.data.view(-1)[start : start + len(chunk)].copy_(chunk)

    def settle(self) -> None:
        self.param.data.copy_(self.theta)


class Compensated:
    """Theta is the weights and the bits below them; it exists one chunk at a time."""

    theta = None

    def __init__(self, tensor: NamedTensor, dtype: torch.dtype):
        self.param, self.salt = tensor.param, tensor.id
        self.buffers = {"compensation": torch.zeros_like(tensor.param, dtype=dtype)}

    def read(self, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        low = self.buffers["compensation"]
        return join(self.param.data.view(-1)[start:stop], low.view(-1)[start:stop], room)

    def write(self, start: int, chunk: Tensor, seed: int) -> None:
        stop, low = start + len(chunk), self.buffers["compensation"]
        weights = self.param.data.view(-1)[start:stop]
        split(chunk, weights, low.view(-1)[start:stop], start, seed ^ self.salt)

    def settle(self) -> None:
        pass


def storage(tensor: NamedTensor, precision: str) -> InPlace | Master | Compensated:
    """Theta's storage under a precision. Raises UserError if the two do not go together."""
    chosen = policy(precision, tensor.param.dtype)
    if chosen == "master":
        return Master(tensor)
    if chosen.startswith("compensated"):
        if not tensor.param.is_contiguous():
            raise UserError(f"precision {chosen} needs contiguous weights, and {tensor.name} is not: choose master.")
        return Compensated(tensor, torch.int16 if chosen == "compensated-16" else torch.int8)
    return InPlace(tensor)
