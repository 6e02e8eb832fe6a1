"""How theta is stored while it is probed and updated: the policies of `precision`.

In place, a probe is added to the weights and removed again. In float32 the weights drift by 2e-6 of their rms in 1,000
steps; in bfloat16 they drift by 12 % of it (at learning rate 0), which replaces the model by noise, and in float16 by 1.5 %.
Weights narrower than float32 are therefore not perturbed in place, unless one asks for it by name. Either theta is a float32
master and the weights are its rounding, or theta is the weights together with the bits lost in rounding, and a probe is applied
to a scratch copy (metazo/step/substitute.py). benchmarks/precision.py measures each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, checksum, chunks
from metazo.errors import UserError
from metazo.kernels.splitfloat import LAYOUTS, flushes, join, split


@dataclass(frozen=True)
class Policy:
    """bytes: extra bytes per weight. note: a description for messages."""

    bytes: int
    note: str


POLICIES = {
    "in-place": Policy(0, "weights perturbed in place"),
    "master": Policy(4, "float32 master; the weights are its rounding"),
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
DRIFTS = {torch.bfloat16: "12 %", torch.float16: "1.5 %"}
"""Drift of weights in place over 1,000 steps as a share of their rms (benchmarks/precision.json)."""


def policy(precision: str, dtype: torch.dtype) -> str:
    """The policy for a tensor of that dtype. Compensation applies to narrow tensors; float32 tensors stay in place.

    Raises UserError if the two do not go together.
    """
    if precision not in PRECISIONS:
        raise UserError(f"`precision` {precision!r} is unknown: choose {', '.join(PRECISIONS)}.")
    if precision == "auto":
        return DEFAULTS.get(dtype, "master")
    if precision == "autocast" and dtype != torch.float32:
        raise UserError(f"`precision` autocast is for float32 weights, and these are {dtype}: choose master.")
    if precision.startswith("compensated") and dtype not in LAYOUTS:
        return "in-place"
    return precision


def check_used(precision: str, params: Iterable[Tensor]) -> None:
    """Refuse a precision that would change nothing, or lose bits. Not for a replay: logs of such runs exist.

    Raises UserError if the precision is compensated and none of the trained weights is narrower than float32, and for
    masters of float64 weights.
    """
    types = {param.dtype for param in params}
    if precision.startswith("compensated") and types and types.isdisjoint(LAYOUTS):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
        raise UserError(
            f"`precision` {precision} keeps bits below bfloat16 or float16 weights, and the trained weights are {names}, as "
            "those of adapters always are: leave out `precision`, or train the weights themselves with `dtype` bfloat16."
        )
    if precision == "master" and torch.float64 in types:
        raise UserError("`precision` master keeps float32, which is less than the float64 weights have: leave it out.")


def drift(precision: str, params: Iterable[Tensor]) -> str | None:
    """What becomes of narrow weights to which probes are added in place, in words; None if there are none."""
    types = {param.dtype for param in params}
    drifts = [f"{str(kind).removeprefix('torch.')} weights drift by {DRIFTS[kind]}" for kind in DRIFTS if kind in types]
    if precision != "in-place" or not drifts:
        return None
    return (
        f"`precision` in-place rounds weights narrower than float32 at every probe: {' and '.join(drifts)} of their size "
        "in 1,000 steps, and small updates are lost. Leave it out, unless this is what you study."
    )


def without_master(name: str, params: Iterable[Tensor]) -> str | None:
    """What becomes of updates that a method adds to narrow weights themselves, in words; None if there are none.

    An update is lost if it is below half of the distance of two numbers, which is between eps / 4 and eps / 2 of the weight.
    """
    types = {param.dtype for param in params}
    lost = [
        f"1/{4 / torch.finfo(kind).eps:.0f} of a {str(kind).removeprefix('torch.')} weight"
        for kind in DRIFTS
        if kind in types
    ]
    if not lost:
        return None
    return (
        f"{name} in place has no float32 master of its weights: an update below {' or '.join(lost)} is lost by rounding, and "
        "so are small changes of its momentum. A comparison with methods that have one is not fair. Leave `precision` out, "
        "unless this is what you study."
    )


def check_dtype(name: str, was: torch.dtype, now: torch.dtype, when: str) -> None:
    """Raises UserError if a tensor has another dtype than `when` it was looked at, by which its storage was chosen."""
    if now != was:
        then, found = (str(kind).removeprefix("torch.") for kind in (was, now))
        raise UserError(
            f"{name} was {then} when {when} and is {found} now: make the optimizer when the model has its dtype."
        )


def check_flushing(compensated: Iterable[Tensor]) -> None:
    """Raises UserError if this thread would make small ones of these weights 0. torch's switch for it is not that of a GPU."""
    if any(param.dtype == torch.float16 and param.device.type == "cpu" for param in compensated) and flushes():
        raise UserError(
            "`precision` compensated would lose float16 weights below 6.1e-5, because this thread takes the smallest numbers "
            "for 0: call torch.set_flush_denormal(False), or choose master."
        )


def cost(precision: str, params: Iterable[Tensor]) -> tuple[str, int]:
    """The policy of a precision for these weights in words, with its extra bytes per weight."""
    counts: Counter[str] = Counter()
    for param in params:
        counts[policy(precision, param.dtype)] += param.numel()
    words = [f"{name} ({POLICIES[name].note}; {POLICIES[name].bytes} B per weight more)" for name in counts]
    return ", ".join(words), sum(POLICIES[name].bytes * count for name, count in counts.items())


class Storage(Protocol):
    """How theta of one tensor is stored."""

    buffers: dict[str, Tensor]
    """Tensors kept in addition to the weights, saved with the optimizer's state."""

    @property
    def theta(self) -> Tensor | None:
        """Theta as one tensor that may be changed in place, or None if it exists only chunk by chunk."""
        ...

    def read(self, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        """Entries start .. stop - 1 of theta, at least float32; after a change in place, pass them to `write`.

        room: float32 memory to use if theta is not stored as a tensor.
        """
        ...

    def write(self, start: int, chunk: Tensor, seed: int) -> None: ...

    def settle(self) -> None:
        """Update the weights after theta was changed in place."""
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
        self.param, self.version = tensor.param, version_of(tensor.param)
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

    def follow(self) -> bool:
        """Between steps: take up weights that somebody else has changed. Returns: whether they were.

        torch counts changes of a parameter, among them the steps of another optimizer, but not those through `param.data`:
        other memory is noticed (`param.data = ...`, vector_to_parameters), and numbers written to `param.data` are not, and
        are undone by the next step.
        """
        before, self.version = self.version, version_of(self.param)
        if self.version == before or torch.equal(self.param.data, self.theta.to(self.param.dtype)):
            return False
        self.theta.copy_(self.param.data)
        return True


def version_of(param: Tensor) -> tuple[int, int]:
    """The number of changes that torch has counted, and the memory. A shard does not count changes of its DTensor."""
    return sum(one._version for one in _counting(param)), param.data_ptr()


def _counting(param: Tensor) -> list[Tensor]:
    """The tensors whose counters count changes of a parameter."""
    found = (param, getattr(param, "source", None))
    return [one for one in found if one is not None and not one.is_inference()]


def count_change(params: Iterable[Tensor]) -> None:
    """Have torch count a step, whose changes are made through `param.data`, as it counts those of its own optimizers."""
    torch.autograd.graph.increment_version([one for param in params for one in _counting(param)])


class Compensated:
    """Theta is the weights and the bits below them; it exists one chunk at a time."""

    theta = None
    loaded = False
    """Whether a state was loaded since the last step, to which weights may belong that are loaded after it."""
    checksum: int | None = None
    """Of a copy until its first step: of the weights that the bits belong to."""

    def __init__(self, tensor: NamedTensor, dtype: torch.dtype):
        self.param, self.salt = tensor.param, tensor.id
        self.version: tuple[int, int] | None = version_of(tensor.param)
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

    def _checksum(self) -> int:
        flat = self.param.data.view(-1)
        return checksum((start, flat[start:stop]) for start, stop in chunks(self.param))

    def __getstate__(self) -> dict[str, Any]:
        if self.version == version_of(self.param):
            return vars(self) | {"checksum": self._checksum()}
        return vars(self) | {"checksum": self.checksum, "version": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose weights are in other memory: those of the original, unless that has no version."""
        vars(self).update(state)
        if self.version is not None or "checksum" not in state:
            self.version = version_of(self.param)

    def follow(self) -> bool:
        """As `Master.follow`; what is kept of weights that were changed is nothing. Weights that are loaded after a state and
        before a step are taken for those of the state, if they can be. A copy keeps its bits if the same weights are loaded.
        """
        before, self.version = self.version, version_of(self.param)
        loaded, self.loaded = self.loaded, False
        known, self.checksum = self.checksum, None
        low = self.buffers["compensation"]
        if before == self.version or (known is not None and known == self._checksum()):
            return False
        if loaded and not bool(((self.param.data == 0) & (low < 0)).any()):
            return False
        low.zero_()
        return True


def check_contiguous(tensor: NamedTensor) -> None:
    """Raises UserError for weights that cannot be compensated."""
    if not tensor.param.is_contiguous():
        raise UserError(f"`precision` compensated needs contiguous weights, and {tensor.name} is not: choose master.")


def storage(tensor: NamedTensor, precision: str) -> InPlace | Master | Compensated:
    """Theta's storage under a precision. Raises UserError if the two do not go together."""
    chosen = policy(precision, tensor.param.dtype)
    if chosen == "master":
        return Master(tensor)
    if chosen.startswith("compensated"):
        check_contiguous(tensor)
        return Compensated(tensor, torch.int16 if chosen == "compensated-16" else torch.int8)
    return InPlace(tensor)
