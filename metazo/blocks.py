"""A model's parameters as named tensors, and as blocks that share one perturbation scale."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from metazo.errors import UserError


@dataclass(frozen=True, eq=False)
class Spans:
    """The entries of a shard in order, as spans of consecutive entries of the whole tensor.

    here: (n + 1,), int64: the first entry of each of n spans in the flat shard, and the number of entries. there: (n,), int64:
    the first entry of each span in the flat whole tensor. kept: the two on a device, by device.
    """

    here: np.ndarray
    there: np.ndarray
    kept: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def part(self, start: int, stop: int) -> Spans:
        """The spans of entries start .. stop - 1 of the shard, counted from start."""
        if start == 0 and stop == self.here[-1]:
            return self
        first, last = np.searchsorted(self.here, start, "right") - 1, np.searchsorted(self.here, stop)
        here = np.clip(self.here[first : last + 1], start, stop)
        return Spans(here - start, self.there[first:last] + (here - self.here[first : last + 1])[:-1])

    def entries(self) -> np.ndarray:
        """The place of each entry in the flat whole tensor, increasing: (entries,), int64."""
        lengths = np.diff(self.here)
        return np.repeat(self.there - self.here[:-1], lengths) + np.arange(self.here[-1])


def spans_of(places: Sequence[np.ndarray], whole: Sequence[int]) -> Spans:
    """The spans of a shard. places: for each dimension of the whole tensor, the positions that the shard has, increasing."""
    incomplete = [k for k, found in enumerate(places) if len(found) < whole[k]]
    cut = incomplete[-1] if incomplete else 0  # a span does not go beyond one position of the dimensions before it
    rows = np.zeros(1, np.int64)
    for found, size in zip(places[:cut], whole):
        rows = (rows[:, None] * size + found).reshape(-1)
    inner, found = math.prod(whole[cut + 1 :]), places[cut]
    firsts = np.flatnonzero(np.diff(found, prepend=-2) != 1)
    lengths = np.diff(firsts, append=len(found)) * inner
    there = (rows[:, None] * whole[cut] + found[firsts]).reshape(-1) * inner
    return Spans(np.concatenate([[0], np.cumsum(np.tile(lengths, len(rows)))]), there)


class Local(torch.nn.Parameter):
    """The numbers of a model's parameter, in the memory where they are on this process.

    Attributes: source: the parameter if it is a DTensor; home: gives the parameter that the model has at present if accelerate
    offloads it. Both are None in a copy.
    """

    source: Tensor | None = None
    home: Callable[[], Tensor] | None = None

    def __reduce_ex__(self, protocol) -> tuple[Any, ...]:
        return Local, (self.data, self.requires_grad)


class LocalShard(Local):
    """The entries of a parameter that this process has, in the memory of the sharded parameter.

    Attributes: places: for each dimension of the whole parameter, the positions that this process has, increasing, int64;
    whole: the shape of the whole parameter; spans: its entries as spans of the flat whole parameter; sides: the rows of the
    whole matrix (`sides_of`) that this process has, and the places within a row, by device.
    """

    places: tuple[np.ndarray, ...]
    whole: torch.Size
    spans: Spans
    sides: dict[torch.device, tuple[Tensor, Tensor]]

    def __new__(cls, local: Tensor, requires_grad: bool, places: Sequence[np.ndarray], whole: torch.Size):
        made = super().__new__(cls, local, requires_grad)
        made.places, made.whole, made.spans, made.sides = tuple(places), whole, spans_of(places, whole), {}
        return made

    def cut(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of U, (m, r), and of V, (n, r), whose product is this process's part of U V^T."""
        if left.device not in self.sides:
            rows, *others = self.places
            columns = np.ravel_multi_index(np.ix_(*others), self.whole[1:]).reshape(-1)
            self.sides[left.device] = tuple(torch.from_numpy(found).to(left.device) for found in (rows, columns))  # type: ignore[assignment]
        rows, columns = self.sides[left.device]
        return left[rows], right[columns]

    def gathered(self, values: Tensor) -> Tensor:
        """The whole tensor of which this process has `values`, in the shape of this shard. All processes call it at once."""
        from torch.distributed.tensor import DTensor

        assert isinstance(self.source, DTensor)
        source = self.source
        size = {"shape": source.shape, "stride": source.stride()}  # the parts may be unequal
        return DTensor.from_local(values, source.device_mesh, source.placements, run_check=False, **size).full_tensor()

    def __deepcopy__(self, memo: dict[int, object]) -> LocalShard:
        made = LocalShard(self.data.clone(), self.requires_grad, self.places, self.whole)  # type: ignore[call-arg]
        return memo.setdefault(id(self), made)  # type: ignore[return-value]

    def __reduce_ex__(self, protocol):
        return LocalShard, (self.data, self.requires_grad, self.places, self.whole)


def in_training(param: Tensor) -> bool:
    """Whether neither a parameter nor the model's parameter whose numbers it has is frozen."""
    home = getattr(param, "home", None)
    source = getattr(param, "source", None) if home is None else home()
    return param.requires_grad and (source is None or source.requires_grad)


def shape_of(param: Tensor) -> torch.Size:
    """The shape of a tensor; of a shard, that of the whole tensor."""
    return getattr(param, "whole", param.shape)


def sides_of(param: Tensor) -> tuple[int, int]:
    """Rows, and entries per row, of a tensor as a matrix; of a shard, those of the whole tensor."""
    shape = shape_of(param)
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True)
class NamedTensor:
    """A trainable tensor. Its noise depends on its name alone, so freezing other tensors does not change it."""

    name: str
    param: torch.nn.Parameter
    id: int  # 64 bits of the hash of the name
    group: int = 0  # index of its parameter group

    @property
    def spans(self) -> Spans | None:
        """If this process has a shard of the tensor: its entries as spans of the flat whole tensor."""
        return getattr(self.param, "spans", None)

    @property
    def entire(self) -> NamedTensor:
        """The tensor as its noise sees it if no process has a shard of it: whole, with a parameter that has no memory."""
        if self.spans is None:
            return self
        return replace(self, param=self.param.data.new_empty(1).expand(shape_of(self.param)))


@dataclass(frozen=True)
class Block:
    """Tensors that share one scale. Published: one tensor per block."""

    name: str
    tensors: tuple[NamedTensor, ...]

    @property
    def numel(self) -> int:
        return sum(shape_of(tensor.param).numel() for tensor in self.tensors)


def tensor_id(name: str) -> int:
    """64 bits of the hash of the name, without what torch.compile puts in it: a compiled model has the noise of the model."""
    return int.from_bytes(hashlib.blake2b(uncompiled(name).encode(), digest_size=8).digest(), "little")


def uncompiled(name: str) -> str:
    return name.replace("_orig_mod.", "")


def named_tensors(named: torch.nn.Module | Iterable[tuple[str, Tensor]], group: int = 0) -> list[NamedTensor]:
    """The trainable tensors in order; a tied tensor once, under its first name, and none without entries.

    Raises UserError if no tensor is trainable or two tensors share a name.
    """
    tensors = trained(named, group)
    check_names(tensors)
    return tensors


def trained(named: torch.nn.Module | Iterable[tuple[str, Tensor]], group: int = 0) -> list[NamedTensor]:
    """As `named_tensors`, unchecked, and perhaps none. A shard is one of them even if this process has no entries of it."""
    pairs = named.named_parameters() if isinstance(named, torch.nn.Module) else named
    seen: set[int] = set()
    tensors: list[NamedTensor] = []
    for name, param in pairs:
        if in_training(param) and id(param) not in seen:
            seen.add(id(param))
            if isinstance(param, LocalShard) or is_lazy(param) or param.numel():
                tensors.append(NamedTensor(name, param, tensor_id(name), group))  # type: ignore[arg-type]
    return tensors


def every_tensor(model: torch.nn.Module) -> list[NamedTensor]:
    """All tensors of a model, whether they are trained or not."""
    return [NamedTensor(name, param, tensor_id(name)) for name, param in model.named_parameters()]


def check_names(tensors: Sequence[NamedTensor]) -> None:
    if not tensors:
        raise UserError(
            "No tensor is trainable: every parameter is frozen or empty; pass at least one with requires_grad=True."
        )
    names = [uncompiled(tensor.name) for tensor in tensors]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"Two tensors are named {twice!r}: noise depends on the name, so give each its own.")


# The first number between dots is the layer in transformers' names: model.layers.3.mlp..., bert.encoder.layer.3....
_LAYER = re.compile(r"^(.*?\.\d+)\.")


def partition(tensors: Sequence[NamedTensor], by: str = "tensor") -> list[Block]:
    """Cut into blocks: "tensor", one each (ZO Fine-tuner); "layer", the tensors of a numbered layer share one, the
    rest (embeddings, head, last norm) have one each (the ablation of arXiv 2510.00419).
    """
    if by == "tensor":
        return [Block(tensor.name, (tensor,)) for tensor in tensors]
    if by != "layer":
        raise UserError(f"Blocks by {by!r} are unknown: choose tensor or layer.")
    blocks: dict[str, list[NamedTensor]] = {}
    for tensor in tensors:
        match = _LAYER.match(tensor.name)
        blocks.setdefault(match.group(1) if match else tensor.name, []).append(tensor)
    return [Block(name, tuple(members)) for name, members in blocks.items()]


OUTSIDE = -1
"""The depth of a block outside the numbered layers."""


def place_of(block: str) -> tuple[int, str]:
    """Depth and kind of a block: `model.layers.3.mlp.up_proj.weight` is at 3 and of kind `mlp.up_proj`.

    The first number between dots is the depth, and the name before it is left out. Without a number the depth is OUTSIDE.
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", block)
    kind = (block[found.end() :] if found else block).removesuffix(".weight")
    return (int(found[1]) if found else OUTSIDE), kind or "layer"


def places_of(blocks: Sequence[str]) -> list[tuple[int, str]]:
    """`place_of` each block, and no two alike: if layers of an encoder and of a decoder have the same numbers, a kind begins
    with the part of the name before the number that tells them apart (`decoder layer.0.SelfAttention.q`).
    """
    places = [place_of(block) for block in blocks]
    if len(set(places)) == len(places):
        return places
    stems = [re.split(r"(?:^|\.)\d+(?:\.|$)", block)[0].split(".") for block in blocks]
    layers = [stem for stem, (depth, _) in zip(stems, places) if depth != OUTSIDE]
    shared = set.intersection(*map(set, layers)) if layers else set()
    return [
        (depth, kind if depth == OUTSIDE else " ".join([*(part for part in stem if part not in shared), kind]))
        for stem, (depth, kind) in zip(stems, places)
    ]


CHUNK = 1 << 20  # entries of a chunk, about: the largest temporary that a step makes
_CHUNK_ON_GPU = 16 * CHUNK  # a GPU takes less time for a chunk of 2^20 than the processor for its launch
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
ALIGN = 2048  # noise can begin at multiples of this (noise.TILE)


def chunks(param: Tensor) -> Iterator[tuple[int, int]]:
    """(start, stop) of the chunks that a tensor is worked on in: flat spans of whole rows, CHUNK entries or less.

    On a GPU they may have 16 times as many. A row is all but the first dimension. If ALIGN rows have more entries, a chunk
    is longer.
    """
    row = math.prod(param.shape[1:]) or 1
    unit = math.lcm(row, ALIGN)
    size = _CHUNK_ON_GPU if param.is_cuda else CHUNK
    step = max(size // unit, 1) * unit
    for start in range(0, param.numel(), step):
        yield start, min(start + step, param.numel())


def checksum(parts: Iterable[tuple[int, Tensor]]) -> int:
    """The sum of the bits of all entries, each times an odd number that depends on its position, modulo 2^64."""
    total = 0
    for start, chunk in parts:
        bits = chunk.contiguous().view(-1).view(_BITS[chunk.element_size()]).to(torch.int64)
        place = torch.arange(start, start + len(bits), device=bits.device).mul_(2).add_(1)
        total += int((bits * place).sum())
    return total % 2**64


def chunk_of(whole: Tensor, start: int, like: Tensor) -> Tensor:
    """The entries of `whole` that `like` holds of a tensor of its shape: all of them, or the chunk from `start`."""
    return whole if like.shape == whole.shape else whole.view(-1)[start : start + like.numel()]
