"""Put a direction on the weights, evaluate, take it off again.

Theta lives where metazo/step/precision.py says: in the weights, in a float32 master, or in the weights and the bits below them.
Weights that hold theta themselves are moved, and taking the direction off is folded into the update: three passes a step.
Weights with a master are round(master + a d), and after probing round(master), bit for bit what they were. Compensated
weights do not move at all while they are probed: `evaluating` shows them moved to the functions that use them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, part, pieces
from metazo.errors import UserError
from metazo.noise import Move, Noise, Stream
from metazo.step.directions import Direction
from metazo.step.precision import Compensated, Home, InPlace, Master, home
from metazo.step.substitute import Scratch


@dataclass(frozen=True)
class Term:
    """A multiple of the direction of one seed: amount * d(seed)."""

    direction: Direction
    seed: int
    amount: float


class Weights:
    """The weights of an optimizer, and what lies on them at present.

    Args: tensors: what is trained, in order. noise: the noise source. precision: see metazo.step.precision; "auto" takes the
    default of each tensor's dtype.
    """

    def __init__(self, tensors: Sequence[NamedTensor], noise: Noise, precision: str = "auto"):
        self.tensors, self.noise = tensors, noise
        self.homes: dict[str, Home] = {tensor.name: home(tensor, precision) for tensor in tensors}
        self.autocast = precision == "autocast"
        self.compensated = [tensor for tensor in tensors if isinstance(self.homes[tensor.name], Compensated)]
        if self.compensated and noise.ordered:
            raise UserError(f"precision {precision} draws noise tensor by tensor as it is used; {noise.name} cannot.")
        longest = max((stop - start for tensor in self.compensated for start, stop in pieces(tensor.param)), default=0)
        self.room = torch.empty(longest)  # for one piece of theta at a time, on the CPU, where it saves time
        self.on: Term | None = None
        self.snapshot: dict[str, Tensor] = {}  # other values by name, given by a method that visits them
        self.away = False  # theta and the snapshot have changed places

    # -- probing --------------------------------------------------------------------------------------------------

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

    def _place(self, direction: Direction, seed: int, amount: float, present: float) -> None:
        stream = self.noise.stream(seed)
        moves: list[Move] = []
        for tensor in self.tensors:
            theta = self.homes[tensor.name].theta
            if theta is None or not direction.touches(tensor):
                continue
            if isinstance(self.homes[tensor.name], Master):
                direction.place_(stream, tensor, tensor.param.data, theta, amount)
            elif stream.ordered:
                direction.add_(stream, tensor, theta, amount - present)
            else:
                moves.append(Move(tensor, theta, amount - present))
        direction.add_all_(stream, moves)

    def _take_off(self) -> None:
        if self.on is None:
            return
        term, self.on = self.on, None
        moves: list[Move] = []
        for tensor in self.tensors:
            place = self.homes[tensor.name]
            if isinstance(place, Master):
                place.settle()
            elif place.theta is not None and term.direction.touches(tensor):
                moves.append(Move(tensor, place.theta, -term.amount))
        term.direction.add_all_(self.noise.stream(term.seed), moves)

    def _exchange(self) -> None:
        """Theta and the snapshot change places, bit for bit: masters by reference, weights by value, a piece at a time.

        Compensated weights stay where they are; `_moved` looks at the snapshot instead.
        """
        for tensor in self.tensors:
            name, place = tensor.name, self.homes[tensor.name]
            if isinstance(place, Master):
                place.buffers["master"], self.snapshot[name] = self.snapshot[name], place.buffers["master"]
                place.settle()
            elif place.theta is not None:
                for start, theta in self.pieces(tensor):
                    other = part(self.snapshot[name], start, theta)
                    kept = theta.clone()
                    theta.copy_(other)
                    other.copy_(kept)
        self.away = not self.away

    @contextmanager
    def evaluating(self) -> Iterator[Scratch | None]:
        """Around every evaluation of a loss: the forward in its type, and compensated weights seen with the probe on."""
        if self.autocast:
            kind = self.tensors[0].param.device.type
            with torch.autocast(kind, torch.bfloat16, cache_enabled=False):  # the cache would be a copy of the weights
                yield None
        elif self.compensated and self.on is not None:
            with Scratch(self.compensated, self._moved) as scratch:
                yield scratch
        else:
            yield None

    def _moved(self, tensor: NamedTensor) -> Tensor:
        """round(theta + probe) of a compensated tensor, in new memory."""
        assert self.on is not None
        out, direction, place = torch.empty_like(tensor.param.data), self.on.direction, self.homes[tensor.name]
        stream, touched = self.noise.stream(self.on.seed), direction.touches(tensor)
        for start, stop in pieces(tensor.param):
            theta = place.read(start, stop, self.room)
            if self.away:
                theta.copy_(self.snapshot[tensor.name].view(-1)[start:stop])
            if touched:
                direction.add_(stream, tensor, theta, self.on.amount, 1.0, start)
            out.view(-1)[start:stop].copy_(theta)
        return out

    # -- reading and changing theta -------------------------------------------------------------------------------

    def values(self, tensor: NamedTensor) -> Iterator[tuple[int, Tensor]]:
        """(start, theta) in pieces of a tensor, each to be read before the next is asked for.

        Whole where noise is ordered or memory not contiguous.
        """
        place = self.homes[tensor.name]
        runs = list(pieces(tensor.param))
        if place.theta is not None and (self.noise.ordered or len(runs) == 1 or not place.theta.is_contiguous()):
            yield 0, place.theta
            return
        for start, stop in runs:
            yield start, place.read(start, stop, self.room)

    def pieces(self, tensor: NamedTensor, seed: int = 0) -> Iterator[tuple[int, Tensor]]:
        """As `values`, to be changed in place; what is there when the next is asked for is kept.

        seed: of the rounding, where that is random.
        """
        place = self.homes[tensor.name]
        for start, theta in self.values(tensor):
            yield start, theta
            if theta is place.theta:
                place.settle()
            else:
                place.write(start, theta, seed)

    def dtype(self, tensor: NamedTensor) -> torch.dtype:
        """Of theta."""
        return tensor.param.dtype if isinstance(self.homes[tensor.name], InPlace) else torch.float32

    def parts(self, tensor: NamedTensor, seed: int = 0) -> Iterator[tuple[int, Tensor]]:
        """As `pieces`, but whole where theta is one tensor: for what makes no temporary."""
        place = self.homes[tensor.name]
        if place.theta is None:
            yield from self.pieces(tensor, seed)
        else:
            yield 0, place.theta
            place.settle()

    def apply(self, terms: Sequence[Term], rate: Callable[[NamedTensor], float], decay: Mapping[str, float]) -> None:
        """theta = decay * theta - rate * sum of terms, one pass over the weights a term.

        What still lies on the weights comes off in the same pass as the term of its seed. decay: factor by tensor
        name, 1 where it is absent.
        """
        terms = sorted(terms, key=lambda term: not self._lies(term))  # the one to fold into comes first
        if not terms or not self._lies(terms[0]):
            self.leave()
        on, self.on = self.on, None
        streams = [self.noise.stream(term.seed) for term in terms]
        moves: list[list[Move]] = [[] for _ in terms]  # of weights in place, at once
        for tensor in self.tensors:
            factor, place = decay.get(tensor.name, 1.0), self.homes[tensor.name]
            amounts = [-rate(tensor) * term.amount for term in terms]
            if on is not None and isinstance(place, InPlace):
                amounts[0] -= factor * on.amount
            touching = [k for k, term in enumerate(terms) if term.direction.touches(tensor)]
            if isinstance(place, InPlace) and touching and not self.noise.ordered:
                for k in touching:
                    moves[k].append(Move(tensor, place.theta, amounts[k], factor if k == touching[0] else 1.0))
            elif factor != 1.0 or touching:
                for start, theta in self.parts(tensor, terms[0].seed if terms else 0):
                    _add_sum_(tensor, theta, terms, streams, amounts, factor, start)
        for term, stream, together in zip(terms, streams, moves):
            term.direction.add_all_(stream, together)

    def _lies(self, term: Term) -> bool:
        on = self.on
        return on is not None and not self.away and (on.seed, on.direction) == (term.seed, term.direction)

    def gradient(self, terms: Sequence[Term]) -> Estimate:
        """The estimate sum of terms; to be added to something for every tensor, in order."""
        return Estimate(terms, [self.noise.stream(term.seed) for term in terms])


@dataclass(frozen=True)
class Estimate:
    """A sum of terms. It never exists as a tensor: it is added to one, or to a piece."""

    terms: Sequence[Term]
    streams: Sequence[Stream]

    def add_(self, tensor: NamedTensor, start: int, out: Tensor, alpha: float, beta: float) -> None:
        """out = beta * out + alpha * estimate, on a tensor (start 0) or the piece of it from start."""
        _add_sum_(tensor, out, self.terms, self.streams, [alpha * term.amount for term in self.terms], beta, start)


def _add_sum_(
    tensor: NamedTensor,
    out: Tensor,
    terms: Sequence[Term],
    streams: Sequence[Stream],
    amounts: Sequence[float],
    beta: float,
    start: int,
) -> None:
    for term, stream, amount in zip(terms, streams, amounts):
        if term.direction.touches(tensor):
            term.direction.add_(stream, tensor, out, amount, beta, start)
            beta = 1.0
    if beta != 1.0:
        out.mul_(beta)
