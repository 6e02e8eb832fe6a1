"""What a source of noise can do: the protocols that steps and methods use. PhiloxNoise and TorchOrderNoise are the sources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.noise.reference import Draw

# The purpose of a number, so that two draws for one tensor and seed are never the same.
DENSE, LEFT, RIGHT, INITIAL = 0, 1, 2, 3


class Move(NamedTuple):
    """out = beta * out + alpha * d of a tensor; out has its shape."""

    tensor: NamedTensor
    out: Tensor
    alpha: float
    beta: float = 1.0


class Place(NamedTuple):
    """out = base + alpha * d of a tensor, rounded to out's type once; out and base have its shape, base is float32."""

    tensor: NamedTensor
    out: Tensor
    base: Tensor
    alpha: float


class Stream(Protocol):
    """The noise of one seed over all tensors. start: the first entry of a chunk in the flat tensor, a multiple of TILE.

    The entries of a shard (`LocalShard`) get the numbers of their places in the whole tensor; start counts the shard's own.
    """

    seed: int

    def prepare(self, draws: Iterable[Draw]) -> None:
        """Announce what is drawn next, about in this order, so that it can be drawn together."""
        ...

    def draw(
        self,
        tensor: NamedTensor,
        shape: tuple[int, ...] | None = None,
        purpose: int = DENSE,
        dtype: torch.dtype | None = None,
        start: int = 0,
        count: int | None = None,
    ) -> Tensor:
        """Numbers of that shape (default: the tensor's; with count: (count,)), in dtype (default: the tensor's, at
        least float32)."""
        ...

    def add_(
        self, tensor: NamedTensor, out: Tensor, alpha: float, beta: float = 1.0, purpose: int = DENSE, start: int = 0
    ) -> None:
        """out = beta * out + alpha * z[start : start + out.numel()], in place, rounded once."""
        ...

    def add_all_(self, moves: Sequence[Move], purpose: int = DENSE) -> None:
        """add_ on whole tensors."""
        ...

    def square(self, tensor: NamedTensor) -> float:
        """|z|^2 over a whole tensor: a draw of it."""
        ...

    def place_(
        self, tensor: NamedTensor, out: Tensor, base: Tensor, alpha: float, purpose: int = DENSE, start: int = 0
    ) -> None:
        """out = base + alpha * z[start : start + out.numel()], rounded to out's type once. base: float32, out's shape."""
        ...

    def place_all_(self, places: Sequence[Place]) -> None:
        """place_ on whole tensors."""
        ...


class Noise(Protocol):
    """Seeds for steps and queries, uniforms for masks, and the stream of a seed.

    `seed` and `uniform` are functions of their arguments and of the run's seed alone, and a stream of its seed, tensor and
    entry: whoever asks, how often, and in which order. A state of the optimizer holds nothing of the noise, so that one whose
    `seed` or `uniform` goes on from call to call, as TorchOrderNoise does, is refused when the state of steps is loaded. A
    replay of all steps asks for all of them again.
    """

    name: str
    run_seed: int

    def seed(self, step: int, query: int = 0) -> int: ...
    def uniform(self, step: int, count: int) -> np.ndarray: ...
    def stream(self, seed: int) -> Stream: ...
    def expect(self, seed: int, draws: Iterable[Draw]) -> None:
        """Announce the draws of a seed, in the order of the published code; noise from a single generator is drawn now."""
        ...
