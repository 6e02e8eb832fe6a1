"""The noise of the published code, for conformance tests: torch's generator, tensors in order.

A step's seed is `numpy.random.randint(1_000_000_000)`; its noise is `torch.manual_seed(seed)` followed by one
`torch.normal(0, 1, size)` per trainable tensor in the order of `named_parameters()` (tests/golden/README.md). The
numbers of a tensor therefore depend on every draw before it, and differ between CPU and CUDA. A stream keeps its numbers,
so that the rest of the library may draw any chunk of any tensor at any time; `expect` announces the order of the first
draws. Use it to compare with recorded trajectories; for all else use PhiloxNoise, which stores nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from metazo.blocks import NamedTensor

Draw = tuple[NamedTensor, tuple[int, ...] | None, int]
"""Numbers of a tensor: their shape (None: the tensor's) and their purpose."""
_KEPT = 64  # number of streams kept, more than the queries of a step


class TorchOrderStream:
    """The numbers of one seed. Each (tensor, purpose) is drawn once, at its first use, and kept."""

    def __init__(self, seed: int, device: torch.device | str = "cpu"):
        self.seed = seed
        self.generator = torch.Generator(device).manual_seed(seed)
        self.drawn: dict[tuple[int, int], Tensor] = {}

    def whole(self, tensor: NamedTensor, shape: tuple[int, ...] | None, purpose: int) -> Tensor:
        """All numbers of a tensor for a purpose, in the tensor's dtype. It is the kept tensor: do not write to it."""
        key = (tensor.id, purpose)
        if key not in self.drawn:
            shape = tuple(tensor.param.shape) if shape is None else shape
            self.drawn[key] = torch.randn(
                shape, generator=self.generator, dtype=tensor.param.dtype, device=self.generator.device
            )
        return self.drawn[key]

    def prepare(self, draws: Iterable[Draw]) -> None:
        """Nothing to do: what is drawn is kept."""

    def draw(
        self,
        tensor: NamedTensor,
        shape: tuple[int, ...] | None = None,
        purpose: int = 0,
        dtype: torch.dtype | None = None,
        start: int = 0,
        count: int | None = None,
    ) -> Tensor:
        """Numbers in new memory, by default in the tensor's dtype."""
        numbers = self.whole(tensor, shape, purpose)
        if count is not None:
            numbers = numbers.view(-1)[start : start + count]
        return numbers.to(dtype or numbers.dtype, copy=True)

    def add_(
        self, tensor: NamedTensor, out: Tensor, alpha: float, beta: float = 1.0, purpose: int = 0, start: int = 0
    ) -> None:
        shape = tuple(out.shape) if purpose else None
        numbers = self.whole(tensor, shape, purpose).view(-1)[start : start + out.numel()]
        out.mul_(beta).add_(numbers.to(out.dtype).view(out.shape), alpha=alpha)

    def add_all_(self, moves: Iterable[tuple], purpose: int = 0) -> None:
        for move in moves:
            self.add_(*move, purpose=purpose)

    def square(self, tensor: NamedTensor) -> float:
        return float(self.whole(tensor, None, 0).double().square().sum())

    def dot(self, tensor: NamedTensor, other: Tensor) -> float:
        return float((self.whole(tensor, None, 0).double() * other.double()).sum())

    def place_all_(self, places) -> None:
        for place in places:
            self.place_(*place)

    def place_(
        self, tensor: NamedTensor, out: Tensor, base: Tensor, alpha: float, purpose: int = 0, start: int = 0
    ) -> None:
        moved = base.clone()
        self.add_(tensor, moved, alpha, 1.0, purpose, start)
        out.copy_(moved)


class TorchOrderNoise:
    """Seeds from numpy's legacy generator, noise from torch's, as the published loops draw them.

    Args:
        run_seed: seeds `numpy.random.RandomState`, as `set_seed` does.
        seeds: recorded step seeds to use instead, one per query, in the order of their use.
    """

    name = "torch-order"

    def __init__(self, run_seed: int = 0, *, seeds: list[int] | None = None, device: torch.device | str = "cpu"):
        self.run_seed = run_seed
        self.state = np.random.RandomState(run_seed)
        self.seeds = list(seeds) if seeds is not None else None
        self.device = device
        self.streams: dict[int, TorchOrderStream] = {}

    def seed(self, step: int, query: int = 0) -> int:
        seed = self.seeds.pop(0) if self.seeds is not None else int(self.state.randint(1_000_000_000))
        self.forget(seed)
        return seed

    def uniform(self, step: int, count: int) -> np.ndarray:
        return self.state.rand(count)

    def stream(self, seed: int) -> TorchOrderStream:
        if seed not in self.streams:
            if len(self.streams) == _KEPT:
                self.streams.pop(next(iter(self.streams)))
            self.streams[seed] = TorchOrderStream(seed, self.device)
        return self.streams[seed]

    def expect(self, seed: int, draws: Iterable[Draw]) -> None:
        """Make these draws of a seed now, in this order; they may be used later in any order."""
        stream = self.stream(seed)
        for tensor, shape, purpose in draws:
            stream.whole(tensor, shape, purpose)

    def forget(self, seed: int) -> None:
        """Restart the stream of a seed, as `torch.manual_seed` does."""
        self.streams.pop(seed, None)
