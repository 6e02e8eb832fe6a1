"""Compares a tuner with a model by names and shapes of tensors and their fingerprint, and puts differences in words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from metazo.blocks import Block, uncompiled

NamedShapes = Iterable[tuple[str, Sequence[int]]]
"""(name, shape) of each parameter, tied ones once: `((n, p.shape) for n, p in model.named_parameters())`."""


@dataclass
class BlockSpec:
    """A block of a tuner: its name and the tensors that share its scale."""

    name: str
    tensors: Sequence[tuple[str, Sequence[int] | None]]
    """Name and shape of each tensor; the shape is None if a published file does not record it."""

    def __post_init__(self) -> None:
        self.tensors = [(name, None if shape is None else tuple(shape)) for name, shape in self.tensors]

    @classmethod
    def of(cls, block: Block) -> BlockSpec:
        """The name and the tensors of a model's block."""
        return cls(block.name, [(tensor.name, tuple(tensor.param.shape)) for tensor in block.tensors])


@dataclass(frozen=True)
class Match:
    """The result of comparing a tuner with a model."""

    matched: list[int]
    """Indices of the tuner's blocks whose tensors the model has, all with the same shape; all other tensors of the model get
    the RMS scale under `allow_partial=True`."""
    differences: list[str]
    """The first three differences, in words."""
    different: int
    """Number of all differences."""
    names_only: bool
    """Whether shapes could not be compared, because the tuner does not know them."""

    @property
    def ok(self) -> bool:
        """Whether tuner and model have the same tensors."""
        return not self.different

    def sentence(self) -> str:
        """The outcome in words, for a message."""
        known = "names" if self.names_only else "names and shapes"
        if self.ok:
            return f"all {len(self.matched)} blocks match by {known}"
        return f"{self.different} differ by {known}, first: {'; '.join(self.differences)}"


def fingerprint(named_shapes: Iterable[tuple[str, Sequence[int] | None]]) -> str | None:
    """sha256 (hex) over the names and shapes of tensors, in any order; None if a shape is unknown.

    Defined as the hash of the JSON array of [name, shape] pairs sorted by name, without spaces, in UTF-8.
    """
    pairs = []
    for name, shape in named_shapes:
        if shape is None:
            return None
        pairs.append([name, [int(n) for n in shape]])
    pairs.sort()
    return sha256(json.dumps(pairs, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def plain_name(name: str) -> str:
    """A tensor's name in the model itself, without what torch.compile, peft and DataParallel or DDP add to it."""
    name = uncompiled(name).replace(".base_layer.", ".")
    for prefix in ("module.", "base_model.model."):
        name = name.removeprefix(prefix)
    return name


def fit(blocks: Sequence[BlockSpec], named_shapes: NamedShapes) -> Match:
    """Compare a tuner's blocks with all parameters of a model, including frozen ones, by `plain_name`."""
    model = {plain_name(name): tuple(int(n) for n in shape) for name, shape in named_shapes}
    blocks = [BlockSpec(b.name, [(plain_name(name), shape) for name, shape in b.tensors]) for b in blocks]
    matched, listed, differences = [], set(), []
    for index, block in enumerate(blocks):
        listed.update(name for name, _ in block.tensors)
        found = [_difference(name, shape, model) for name, shape in block.tensors]
        if any(found):
            differences.append(next(filter(None, found)))
        else:
            matched.append(index)
    unlisted = (f"{name} {shape} is not in the tuner" for name, shape in model.items() if name not in listed)
    differences.extend(unlisted)
    return Match(
        matched=matched,
        differences=differences[:3],
        different=len(differences),
        names_only=any(shape is None for block in blocks for _, shape in block.tensors),
    )


def _difference(name: str, shape: Sequence[int] | None, model: dict[str, tuple[int, ...]]) -> str | None:
    if name not in model:
        return f"{name} is not in the model"
    if shape is not None and model[name] != shape:
        return f"{name} is {model[name]} in the model and {shape} in the tuner"
    return None
