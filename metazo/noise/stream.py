"""The noise of one seed over all tensors, on whatever device each of them is, by the fastest kernels that support it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from metazo.blocks import NamedTensor, Spans
from metazo.noise import philox
from metazo.noise.ahead import Ahead
from metazo.noise.philox import TILE
from metazo.noise.protocol import DENSE, Move, Place, Stream
from metazo.noise.reference import Draw

_COMPILERS = {"cpu": "numba", "cuda": "triton"}
_SPLIT = ("cpu_split", "cuda_split")  # the kernels for weights in two parts
_CHUNK = 1 << 20  # entries drawn at once by the plain backend, a multiple of TILE


@cache
def _compiled(device: str) -> ModuleType | ImportError | None:
    """The kernels for a kind of device, imported when they are first needed; or why there are none."""
    try:
        return importlib.import_module(f"metazo.noise.{device}") if device in (*_COMPILERS, *_SPLIT) else None
    except ImportError as error:
        return error


def backends() -> dict[str, str]:
    """The backend of the noise on each kind of device, with the reason if it is the plain form."""
    found = {device: _compiled(device) for device in _COMPILERS}
    return {
        device: _COMPILERS[device] if isinstance(kernels, ModuleType) else f"plain torch, much slower: {kernels}"
        for device, kernels in found.items()
    }


class PhiloxStream:
    """The numbers of one seed, the same on every device, with every kernel, and however a tensor is divided."""

    def __init__(self, seed: int, distribution: str, backend: str):
        self.seed, self.distribution, self.backend = seed, distribution, backend
        self.ahead: Ahead | None = None

    def prepare(self, draws: Iterable[Draw]) -> None:
        self.ahead = None if self.backend == "torch" else Ahead(draws)

    def draw(
        self,
        tensor: NamedTensor,
        shape: tuple[int, ...] | None = None,
        purpose: int = DENSE,
        dtype: torch.dtype | None = None,
        start: int = 0,
        count: int | None = None,
    ) -> Tensor:
        param = tensor.param
        if shape is not None and purpose == DENSE:
            _whole(tensor)
        if shape is None:
            shape = tuple(param.shape) if count is None else (count,)
        dtype = dtype or torch.promote_types(param.dtype, torch.float32)
        if self.ahead is not None and start == 0:
            made = self.ahead.take(tensor, purpose, dtype, self.add_all_)
            if made is not None and made.numel() == math.prod(shape):
                return made.view(shape)
        out = torch.zeros(shape, dtype=dtype, device=param.device)
        self.add_(tensor, out, 1.0, 1.0, purpose, start)
        return out

    def add_(
        self, tensor: NamedTensor, out: Tensor, alpha: float, beta: float = 1.0, purpose: int = DENSE, start: int = 0
    ) -> None:
        _check(start)
        kernels, spans = self._kernels(out), _part(tensor, purpose, start, out)
        if kernels is None:
            self._plain(tensor, out, out, alpha, beta, purpose, start)
        elif spans is None:
            kernels.add_(self.distribution, out, alpha, beta, self.seed, tensor.id, purpose, start)
        else:
            _shards(kernels).add_all_(self.distribution, [(tensor.id, out, alpha, beta, spans)], self.seed, purpose)

    def add_all_(self, moves: Sequence[Move], purpose: int = DENSE) -> None:
        found = [self._kernels(move.out) for move in moves]
        batch = next((kernels for kernels in found if hasattr(kernels, "add_all_")), None)
        if batch is not None:  # so that threads are woken only once
            fit = [move for move, kernels in zip(moves, found) if kernels is batch]
            placed = [(move, _spans(move.tensor, purpose)) for move in fit]
            whole = [(move.tensor.id, *move[1:]) for move, spans in placed if spans is None]
            batch.add_all_(self.distribution, whole, self.seed, purpose)
            shards = [(move.tensor.id, *move[1:], spans) for move, spans in placed if spans is not None]
            if shards:
                _shards(batch).add_all_(self.distribution, shards, self.seed, purpose)
        for move, kernels in zip(moves, found):
            if kernels is None or kernels is not batch:
                self.add_(*move, purpose)

    def place_(
        self, tensor: NamedTensor, out: Tensor, base: Tensor, alpha: float, purpose: int = DENSE, start: int = 0
    ) -> None:
        _check(start)
        kernels = self._kernels(out, base) if base.dtype == torch.float32 else None
        spans = _part(tensor, purpose, start, out)
        if kernels is None:
            self._plain(tensor, out, base, alpha, 1.0, purpose, start)
        elif spans is None:
            kernels.place_(self.distribution, out, base, alpha, self.seed, tensor.id, purpose, start)
        else:
            _shards(kernels).place_all_(self.distribution, [(tensor.id, out, base, alpha, spans)], self.seed, purpose)

    def place_all_(self, places: Sequence[Place]) -> None:
        found = [self._kernels(place.out, place.base) for place in places]
        batch = next((kernels for kernels in found if hasattr(kernels, "place_all_")), None)
        fit = [
            batch is not None and found[k] is batch and places[k].base.dtype == torch.float32
            for k in range(len(places))
        ]
        if batch is not None:  # one launch
            together = [place for place, fits in zip(places, fit) if fits]
            whole = [(place.tensor.id, *place[1:]) for place in together if place.tensor.spans is None]
            batch.place_all_(self.distribution, whole, self.seed, DENSE)
            shards = [(p.tensor.id, *p[1:], spans) for p in together if (spans := p.tensor.spans) is not None]
            if shards:
                _shards(batch).place_all_(self.distribution, shards, self.seed, DENSE)
        for place, fits in zip(places, fit):
            if not fits:
                self.place_(*place)

    def place_split_(
        self, tensor: NamedTensor, out: Tensor, weights: Tensor, low: Tensor, alpha: float, rows: Tensor | None = None
    ) -> bool:
        """out = join(weights, low) + alpha * z on a whole tensor, rounded once, in one pass (cpu_split.py).

        rows: if given, only these rows of out must be written. Returns: False, with nothing done, if there is no such
        kernel for these tensors.
        """
        _whole(tensor)
        kernels = self._split_kernels(weights, low)
        if kernels is None or out.dtype != weights.dtype or not out.is_contiguous():
            return False
        flat = out.view(-1), weights.view(-1), low.view(-1)
        spans = None if rows is None or weights.device.type != "cpu" else _tiles(rows, weights.shape)
        kernels.place_(self.distribution, *flat, alpha, self.seed, tensor.id, DENSE, 0, spans)
        return True

    def add_split_(
        self, tensor: NamedTensor, weights: Tensor, low: Tensor, alpha: float, beta: float, rounding: int
    ) -> bool:
        """weights, low = split(beta * join(weights, low) + alpha * z), as `place_split_`."""
        _whole(tensor)
        kernels = self._split_kernels(weights, low)
        if kernels is None:
            return False
        flat = weights.view(-1), low.view(-1)
        kernels.add_(self.distribution, *flat, alpha, beta, self.seed, tensor.id, DENSE, 0, rounding)
        return True

    def _split_kernels(self, weights: Tensor, low: Tensor) -> ModuleType | None:
        if self.backend == "torch" or not isinstance(_compiled(weights.device.type), ModuleType):
            return None
        kernels = _compiled(f"{weights.device.type}_split")
        return kernels if isinstance(kernels, ModuleType) and kernels.supports(weights, low) else None

    def dot(self, tensor: NamedTensor, other: Tensor) -> float:
        """<z, other> over a whole tensor, summed in float64, without storing z."""
        _whole(tensor)
        kernels = self._kernels(other)
        if kernels is not None and hasattr(kernels, "dot"):
            return kernels.dot(self.distribution, other, self.seed, tensor.id, DENSE)
        flat, chunk = other.reshape(-1), _chunk(other)
        sums = [
            torch.dot(self.draw(tensor, start=start, count=len(part)).double(), part.double())
            for start, part in zip(range(0, flat.numel(), chunk), flat.split(chunk))
        ]
        return sum(torch.stack(sums).tolist()) if sums else 0.0  # a GPU is asked once

    def square(self, tensor: NamedTensor) -> float:
        """|z|^2 over a whole tensor, of a shard too, summed in float64, without storing z."""
        kernels, tensor = self._kernels(tensor.param.data), tensor.entire
        size = tensor.param.numel()
        if kernels is not None and hasattr(kernels, "square"):
            return kernels.square(self.distribution, size, self.seed, tensor.id, DENSE)
        chunk = _chunk(tensor.param)
        ranges = [(start, min(chunk, size - start)) for start in range(0, size, chunk)]
        sums = [self.draw(tensor, start=start, count=count).double().square().sum() for start, count in ranges]
        return sum(torch.stack(sums).tolist()) if sums else 0.0

    def _kernels(self, *tensors: Tensor) -> ModuleType | None:
        """The compiled kernels that support these tensors, or None."""
        kernels = None if self.backend == "torch" else _compiled(tensors[0].device.type)
        return kernels if isinstance(kernels, ModuleType) and kernels.supports(*tensors) else None

    def _plain(
        self, tensor: NamedTensor, out: Tensor, base: Tensor, alpha: float, beta: float, purpose: int, start: int
    ) -> None:
        """out = beta * base + alpha * z, calculated in base's type, at least float32."""
        if out.is_meta:  # a dry run: shapes without numbers
            return
        sample, wide = philox.DISTRIBUTIONS[self.distribution], torch.promote_types(base.dtype, torch.float32)
        flat, source = out.reshape(-1), base.reshape(-1)
        for here in range(0, flat.numel(), _CHUNK):
            kept = source[here : here + _CHUNK].to(wide)
            z = [
                sample(self.seed, tensor.id, purpose, first, last, out.device)
                for first, last in _places(tensor, purpose, start + here, kept.numel())
            ]
            flat[here : here + _CHUNK] = kept * beta + torch.cat(z).to(wide) * alpha
        if not out.is_contiguous():
            out.copy_(flat.view(out.shape))


def _shards(kernels: ModuleType) -> ModuleType:
    """The kernels for shards that belong to those for whole tensors."""
    return importlib.import_module(f"{kernels.__name__}_shards")


def _spans(tensor: NamedTensor, purpose: int) -> Spans | None:
    """The spans of a shard; None if the numbers are not divided: those of a whole tensor, and of the factors of any tensor,
    which every process needs whole.
    """
    return tensor.spans if purpose == DENSE else None


def _part(tensor: NamedTensor, purpose: int, start: int, out: Tensor) -> Spans | None:
    """The spans of `out`, which has the numbers from start, if they are divided."""
    spans = _spans(tensor, purpose)
    return None if spans is None else spans.part(start, start + out.numel())


def _places(tensor: NamedTensor, purpose: int, start: int, count: int) -> list[tuple[int, int]]:
    """Where `count` numbers from start are among all of the tensor, as (first, end) of each span."""
    spans = _spans(tensor, purpose)
    if spans is None:
        return [(start, start + count)]
    spans = spans.part(start, start + count)
    return list(zip(spans.there.tolist(), (spans.there + np.diff(spans.here)).tolist()))


def _chunk(tensor: Tensor) -> int:
    """Entries summed at once."""
    return 16 * _CHUNK if tensor.is_cuda else _CHUNK


def _whole(tensor: NamedTensor) -> None:
    if tensor.spans is not None:
        raise ValueError(f"{tensor.name} is a shard, and this needs a whole tensor")


def _tiles(rows: Tensor, shape: torch.Size) -> list[tuple[int, int]] | None:
    """The entries of the tiles that hold these rows of a tensor, as (first, end); None if they are most of the tensor."""
    count, width = shape[0], shape[1:].numel()
    wanted = np.unique(rows.numpy(force=True))
    first = wanted[(wanted >= 0) & (wanted < count)] * width  # the function that reads the rows refuses all others
    if not len(first) or 2 * len(first) * (width + TILE) > count * width:
        return None
    entries = np.minimum(first[:, None] + np.arange(0, width + TILE, TILE), first[:, None] + width - 1)
    return [(tile * TILE, (tile + 1) * TILE) for tile in np.unique(entries // TILE).tolist()]


def add_two_all_(first: Stream, second: Stream, moves: Sequence[Move], again: Sequence[float]) -> None:
    """out = beta * out + alpha * z(first) + again * z(second) on whole tensors, in one pass if there are kernels for them.

    One pass removes a probe and applies the next. The result is bit-identical to `first.add_all_(moves)` followed by
    `second.add_all_` with the amounts `again`, which are called for other kinds of noise.
    """
    rest = list(range(len(moves)))
    if isinstance(first, PhiloxStream) and isinstance(second, PhiloxStream):
        same = (first.distribution, first.backend) == (second.distribution, second.backend)
        found = [first._kernels(move.out) if same and move.tensor.spans is None else None for move in moves]
        batch = next((kernels for kernels in found if hasattr(kernels, "add_two_all_")), None)
        if batch is not None:
            fit = [
                (move.tensor.id, *move[1:], amount)
                for move, amount, kernels in zip(moves, again, found)
                if kernels is batch
            ]
            batch.add_two_all_(first.distribution, fit, (first.seed, second.seed), DENSE)
            rest = [k for k in rest if found[k] is not batch]
    first.add_all_([moves[k] for k in rest])
    second.add_all_([Move(moves[k].tensor, moves[k].out, again[k]) for k in rest])


def _check(start: int) -> None:
    if start % TILE:
        raise ValueError(f"noise starts at a multiple of {TILE} (noise.TILE), not at {start}")
