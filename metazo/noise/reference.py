"""The noise of the published code, for conformance: torch's generator, tensors in order.

A step's seed is `numpy.random.randint(1_000_000_000)`; its noise is `torch.manual_seed(seed)` followed by one
`torch.normal(0, 1, size)` per trainable tensor in the order of `named_parameters()` (tests/golden/README.md). The
numbers of a tensor therefore depend on all tensors before it, and differ between CPU and CUDA. Use it to compare with
recorded trajectories; for work, use PhiloxNoise.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from metazo.blocks import NamedTensor


class TorchOrderStream:
    """The numbers of one seed, drawn in order; every draw moves on."""

    ordered = True

    def __init__(self, seed: int, device: torch.device | str = "cpu"):
        self.seed = seed
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(
        self,
        tensor: NamedTensor,
        shape: tuple[int, ...] | None = None,
        purpose: int = 0,
        dtype: torch.dtype | None = None,
        start: int = 0,
        count: int | None = None,
    ) -> Tensor:
        """The next numbers, in the tensor's dtype. The purpose is ignored: order alone tells draws apart.

        Raises ValueError for a part of a tensor (start, count): the numbers come in order, whole tensors at a time.
        """
        if start or count not in (None, tensor.param.numel()):
            raise ValueError("noise in torch's order has no pieces: draw the whole tensor (noise.ordered is True)")
        shape = tuple(tensor.param.shape) if shape is None else shape
        return torch.randn(
            shape, generator=self.generator, dtype=dtype or tensor.param.dtype, device=self.generator.device
        )

    def add_(
        self,
        tensor: NamedTensor,
        out: Tensor,
        alpha: float,
        beta: float = 1.0,
        purpose: int = 0,
        start: int = 0,
    ) -> None:
        z = self.draw(tensor, dtype=out.dtype, start=start, count=out.numel())
        out.mul_(beta).add_(z.view(out.shape), alpha=alpha)

    def add_all_(self, moves: Iterable[tuple], purpose: int = 0) -> None:
        for move in moves:
            self.add_(*move)

    def square(self, tensor: NamedTensor) -> float:
        return float(self.draw(tensor).double().square().sum())

    def place_(
        self,
        tensor: NamedTensor,
        out: Tensor,
        base: Tensor,
        alpha: float,
        purpose: int = 0,
        start: int = 0,
    ) -> None:
        z = self.draw(tensor, dtype=base.dtype, start=start, count=out.numel())
        out.copy_(torch.add(base, z.view(out.shape), alpha=alpha))


class TorchOrderNoise:
    """Seeds from numpy's legacy generator, noise from torch's, as the published loops draw them.

    Args:
        run_seed: seeds `numpy.random.RandomState`, as `set_seed` does.
        seeds: recorded step seeds to use instead, one per query in the order they are asked for.
    """

    name = "torch-order"
    ordered = True  # a tensor's numbers depend on those drawn before it

    def __init__(self, run_seed: int = 0, *, seeds: list[int] | None = None, device: torch.device | str = "cpu"):
        self.run_seed = run_seed
        self.state = np.random.RandomState(run_seed)
        self.seeds = list(seeds) if seeds is not None else None
        self.device = device

    def seed(self, step: int, query: int = 0) -> int:
        if self.seeds is not None:
            return self.seeds.pop(0)
        return int(self.state.randint(1_000_000_000))

    def uniform(self, step: int, count: int) -> np.ndarray:
        return self.state.rand(count)

    def stream(self, seed: int) -> TorchOrderStream:
        return TorchOrderStream(seed, self.device)
