"""The one noise source, z = f(seed, tensor, element): philox.py defines it, and cpu.py and cuda.py are its fast forms."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from metazo.errors import UserError
from metazo.noise import philox
from metazo.noise.philox import TILE
from metazo.noise.protocol import DENSE, INITIAL, LEFT, RIGHT, Move, Noise, Place, Stream
from metazo.noise.reference import Draw, TorchOrderNoise
from metazo.noise.stream import PhiloxStream, add_two_all_, backends

__all__ = ["TILE", "Draw", "Move", "Noise", "PhiloxNoise", "Place", "PhiloxStream", "Stream", "TorchOrderNoise"]
__all__ += ["DENSE", "INITIAL", "LEFT", "RIGHT", "add_two_all_", "backends"]

_SEEDS, _UNIFORM, _LOW = 0xFFFF0001, 0xFFFF0002, 0xFFFFFFFF


class PhiloxNoise:
    """Counter-based noise (philox.py).

    Args:
        run_seed: the run's seed, 64 bits; seeds of steps and queries follow from it.
        distribution: "gaussian" or "rademacher" (signs; the same mean and variance, lighter tails).
        backend: "auto" takes the fastest kernel for a tensor, "torch" the plain form; the numbers are the same.
    """

    def __init__(self, run_seed: int = 0, distribution: str = "gaussian", backend: str = "auto"):
        if distribution not in philox.DISTRIBUTIONS:
            raise UserError(f"`noise` {distribution!r} is unknown: choose {' or '.join(philox.DISTRIBUTIONS)}.")
        self.run_seed, self.distribution, self.backend = run_seed, distribution, backend
        self.name = f"philox4x32-10/{distribution}/2"

    def seed(self, step: int, query: int = 0) -> int:
        """Seed of one query of one step: 63 bits, a hash of (run seed, step, query)."""
        counter, key = (0, _SEEDS, query & _LOW, step & _LOW), (self.run_seed & _LOW, self.run_seed >> 32 & _LOW)
        # with Python integers: tensors of one entry take 100 times as long
        low, high, *_ = philox.philox(counter, key)
        return (high << 32 | low) & 0x7FFFFFFFFFFFFFFF

    def uniform(self, step: int, count: int) -> np.ndarray:
        """Uniform numbers in [0, 1) for a step. Returns: (count,), float64."""
        w = philox.words(self.run_seed, step, _UNIFORM, 0, math.ceil(count / 2)).numpy().reshape(-1, 2)
        return ((w[:, 0] << 21 | w[:, 1] >> 11) * 2.0**-53)[:count]

    def stream(self, seed: int) -> PhiloxStream:
        return PhiloxStream(seed, self.distribution, self.backend)

    def expect(self, seed: int, draws: Iterable[Draw]) -> None:
        """Nothing to do: the numbers do not depend on the order in which they are drawn."""
