"""Put a direction on the weights, evaluate, take it off again.

Two policies for where theta lives while it is probed and updated. `InPlace` moves the weights themselves and folds
taking the direction off into the update: three passes a step, no memory, and a rounding drift of 4e-8 over 1,000 steps
in float32. In bfloat16 the same arithmetic replaced the model by noise (12 % of its rms in 1,000 steps at learning
rate 0), so weights narrower than float32 have a `Master` copy in float32, which is never perturbed: the weights are
round(master + a d), and after probing round(master), bit for bit what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.directions import Direction
from metazo.errors import UserError
from metazo.noise import Noise

PRECISIONS = ("auto", "in-place", "master")


@dataclass(frozen=True)
class Term:
    """A multiple of the direction of one seed: amount * d(seed)."""

    direction: Direction
    seed: int
    amount: float


class Weights:
    """The weights of an optimizer, and what lies on them at present.

    Args:
        tensors: what is trained, in order.
        noise: the noise source.
        precision: "in-place" for every tensor, "master" for every tensor, or "auto": in place for float32 and float64,
            a float32 master (4 bytes a weight more) for narrower ones.
    """

    def __init__(self, tensors: Sequence[NamedTensor], noise: Noise, precision: str = "auto"):
        if precision not in PRECISIONS:
            raise UserError(f"precision {precision!r} is unknown: choose {', '.join(PRECISIONS)}.")
        self.tensors, self.noise = tensors, noise
        self.master: dict[str, Tensor] = {
            tensor.name: tensor.param.detach().to(torch.float32, copy=True)
            for tensor in tensors
            if precision == "master" or (precision == "auto" and tensor.param.dtype.itemsize < 4)
        }
        self.on: Term | None = None
        self.snapshot: dict[str, Tensor] = {}  # other values by name, given by a method that visits them
        self.away = False  # theta and the snapshot have changed places

    def visit(self, direction: Direction, seed: int, amount: float, snapshot: bool = False) -> None:
        """Move the weights to theta (or the snapshot) + amount * d(seed), from wherever they are."""
        if self.on is not None and (self.on.seed, self.on.direction, self.away) == (seed, direction, snapshot):
            self._place(direction, seed, amount, self.on.amount)
        else:
            self.leave()
            if snapshot:
                self._exchange()
            self._place(direction, seed, amount, 0.0)
        self.on = Term(direction, seed, amount)

    def leave(self) -> None:
        """Back to theta."""
        self._take_off()
        if self.away:
            self._exchange()

    def _exchange(self) -> None:
        """Theta and the snapshot change places, bit for bit: masters by reference, weights by value."""
        for tensor in self.tensors:
            name, param = tensor.name, tensor.param.data
            if name in self.master:
                self.master[name], self.snapshot[name] = self.snapshot[name], self.master[name]
                param.copy_(self.master[name])
            else:
                kept = param.clone()
                param.copy_(self.snapshot[name])
                self.snapshot[name].copy_(kept)
        self.away = not self.away

    def _take_off(self) -> None:
        if self.on is None:
            return
        term, self.on = self.on, None
        stream = self.noise.stream(term.seed)
        for tensor in self.tensors:
            master = self.master.get(tensor.name)
            if master is not None:
                tensor.param.data.copy_(master)
            elif term.direction.touches(tensor):
                term.direction.add_(stream, tensor, tensor.param.data, -term.amount)

    def _place(self, direction: Direction, seed: int, amount: float, present: float) -> None:
        stream = self.noise.stream(seed)
        for tensor in self.tensors:
            if not direction.touches(tensor):
                continue
            master = self.master.get(tensor.name)
            if master is None:
                direction.add_(stream, tensor, tensor.param.data, amount - present)
            else:
                tensor.param.data.copy_(direction.draw(stream, tensor, torch.float32).mul_(amount).add_(master))

    def theta(self, tensor: NamedTensor) -> Tensor:
        """Where theta of a tensor lives: its master, or the parameter itself. Valid after `leave`."""
        return self.master.get(tensor.name, tensor.param.data)

    def settle(self, tensor: NamedTensor) -> None:
        """After theta(tensor) was changed in place: bring the parameter up to date."""
        master = self.master.get(tensor.name)
        if master is not None:
            tensor.param.data.copy_(master)

    def apply(self, terms: Sequence[Term], rate: Callable[[NamedTensor], float], decay: Mapping[str, float]) -> None:
        """theta = decay * theta - rate * sum of terms, one pass over the weights a term.

        What still lies on the weights comes off in the same pass as the term of its seed. decay: factor by tensor
        name, 1 where it is absent.
        """
        terms = sorted(terms, key=lambda term: not self._lies(term))  # the one to fold into comes first
        if not terms or not self._lies(terms[0]):
            self.leave()
        on, self.on = self.on, None
        for index, term in enumerate(terms):
            stream = self.noise.stream(term.seed)
            for tensor in self.tensors:
                factor = decay.get(tensor.name, 1.0) if index == 0 else 1.0
                amount = -rate(tensor) * term.amount
                if on is not None and index == 0 and tensor.name not in self.master:
                    amount -= factor * on.amount
                theta = self.theta(tensor)
                if term.direction.touches(tensor):
                    term.direction.add_(stream, tensor, theta, amount, factor)
                elif factor != 1.0:
                    theta.mul_(factor)
        for tensor in self.tensors:
            self.settle(tensor)

    def _lies(self, term: Term) -> bool:
        on = self.on
        return on is not None and not self.away and (on.seed, on.direction) == (term.seed, term.direction)

    def gradient(self, terms: Sequence[Term]) -> Callable[[NamedTensor], Tensor]:
        """A function that gives the estimate sum of terms on each tensor; call it for every tensor, in order."""
        streams = [self.noise.stream(term.seed) for term in terms]

        def estimate(tensor: NamedTensor) -> Tensor:
            total = torch.zeros_like(self.theta(tensor))
            for term, stream in zip(terms, streams):
                if term.direction.touches(tensor):
                    term.direction.add_(stream, tensor, total, term.amount)
            return total

        return estimate
