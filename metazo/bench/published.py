"""The published MeZO loop (princeton-nlp/MeZO, large_models/trainer.py), written anew as a baseline for timing.

Four passes over the weights with four draws of the same noise: +eps, -2 eps, +eps to restore, and the update. Each pass
seeds torch's global generator and goes through the parameters in order; the arithmetic is out of place and in the
weights' own precision. Weight decay is 0 and its product is left out, although the published code computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor


class PublishedLoop:
    """Args: params: named parameters; lr; eps; seed: of the generator of the step seeds."""

    def __init__(self, params: Iterable[tuple[str, Tensor]], lr: float = 1e-7, eps: float = 1e-3, seed: int = 0):
        self.params = [param for _, param in params if param.requires_grad]
        self.lr, self.eps = lr, eps
        self.seeds = np.random.RandomState(seed)

    def _move(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for param in self.params:
            z = torch.normal(mean=0.0, std=1.0, size=param.shape, device=param.device, dtype=param.dtype)
            param.data = param.data + scale * z * self.eps

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> float:
        """One step; returns the loss at theta + eps z, as published."""
        seed = int(self.seeds.randint(1_000_000_000))
        self._move(seed, 1)
        plus = _forward(closure)
        self._move(seed, -2)
        minus = _forward(closure)
        self._move(seed, 1)
        c = (plus - minus) / (2 * self.eps)
        torch.manual_seed(seed)
        for param in self.params:
            z = torch.normal(mean=0.0, std=1.0, size=param.shape, device=param.device, dtype=param.dtype)
            param.data = param.data - self.lr * (c * z)
        return plus


def _forward(closure: Callable[[], Tensor]) -> float:
    with torch.inference_mode():
        return float(closure())
