"""The one noise source, z = f(seed, tensor, element): philox.py defines it, cpu.py is its fast form."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.noise import philox
from metazo.noise.reference import TorchOrderNoise

try:
    from metazo.noise import cpu
except ImportError:  # numba is not installed: the plain form gives the same numbers, slower
    cpu = None

__all__ = ["Noise", "PhiloxNoise", "Stream", "TorchOrderNoise"]

# What a number is for, so that two draws for one tensor and seed never meet.
DENSE, LEFT, RIGHT, INITIAL = 0, 1, 2, 3
_SEEDS, _UNIFORM, _LOW = 0xFFFF0001, 0xFFFF0002, 0xFFFFFFFF
_CHUNK = 1 << 20  # elements drawn at once by the plain backend, a multiple of 128


class Stream(Protocol):
    """The noise of one seed over all tensors."""

    def draw(
        self, tensor: NamedTensor, shape: tuple[int, ...] | None = None, purpose: int = DENSE, dtype=None
    ) -> Tensor:
        """Numbers of that shape (default: the tensor's), in dtype (default: the tensor's, at least float32)."""
        ...

    def add_(self, tensor: NamedTensor, out: Tensor, alpha: float, beta: float = 1.0, purpose: int = DENSE) -> None:
        """out = beta * out + alpha * z, in place; out has the tensor's shape."""
        ...


class Noise(Protocol):
    """Seeds for steps and queries, uniforms for masks, and the stream of a seed."""

    name: str
    ordered: bool
    run_seed: int

    def seed(self, step: int, query: int = 0) -> int: ...
    def uniform(self, step: int, count: int) -> np.ndarray: ...
    def stream(self, seed: int) -> Stream: ...


class PhiloxStream:
    def __init__(self, seed: int, distribution: str, backend: str):
        self.seed, self.distribution, self.backend = seed, distribution, backend

    def draw(
        self, tensor: NamedTensor, shape: tuple[int, ...] | None = None, purpose: int = DENSE, dtype=None
    ) -> Tensor:
        param = tensor.param
        shape = tuple(param.shape) if shape is None else shape
        dtype = dtype or torch.promote_types(param.dtype, torch.float32)
        out = torch.zeros(shape, dtype=dtype, device=param.device)
        self.add_(tensor, out, 1.0, 1.0, purpose)
        return out

    def add_(self, tensor: NamedTensor, out: Tensor, alpha: float, beta: float = 1.0, purpose: int = DENSE) -> None:
        if self.backend != "torch" and cpu is not None and cpu.supports(out):
            cpu.add_(self.distribution, out, alpha, beta, self.seed, tensor.id, purpose)
            return
        sample = philox.DISTRIBUTIONS[self.distribution]
        flat = out.view(-1) if out.is_contiguous() else out.contiguous().view(-1)
        wide = torch.promote_types(out.dtype, torch.float32)
        for start in range(0, flat.numel(), _CHUNK):
            piece = flat[start : start + _CHUNK]
            z = sample(self.seed, tensor.id, purpose, start, start + piece.numel(), out.device).to(wide)
            kept = piece.to(wide) if beta == 1.0 else piece.to(wide) * beta
            piece.copy_(kept + z * alpha)
        if not out.is_contiguous():
            out.copy_(flat.view(out.shape))


class PhiloxNoise:
    """Counter-based noise (philox.py).

    Args:
        run_seed: the run's seed, 64 bits; seeds of steps and queries follow from it.
        distribution: "gaussian" or "rademacher" (signs; the same mean and variance, lighter tails).
        backend: "auto" takes the fastest there is for a tensor, "torch" the plain form; the numbers are the same.
    """

    ordered = False

    def __init__(self, run_seed: int = 0, distribution: str = "gaussian", backend: str = "auto"):
        if distribution not in philox.DISTRIBUTIONS:
            raise UserError(f"noise {distribution!r} is unknown: choose {' or '.join(philox.DISTRIBUTIONS)}.")
        self.run_seed, self.distribution, self.backend = run_seed, distribution, backend
        self.name = f"philox4x32-10/{distribution}/1"

    def seed(self, step: int, query: int = 0) -> int:
        """Seed of one query of one step: 63 bits, a hash of (run seed, step, query)."""
        counter, key = (0, _SEEDS, query & _LOW, step & _LOW), (self.run_seed & _LOW, self.run_seed >> 32 & _LOW)
        low, high, *_ = philox.philox(counter, key)  # in Python's integers: a tensor of one costs 100 times as much
        return (high << 32 | low) & 0x7FFFFFFFFFFFFFFF

    def uniform(self, step: int, count: int) -> np.ndarray:
        """Uniform numbers in [0, 1) for a step. Returns: (count,), float64."""
        w = philox.words(self.run_seed, step, _UNIFORM, 0, math.ceil(count / 2)).numpy().reshape(-1, 2)
        return ((w[:, 0] << 21 | w[:, 1] >> 11) * 2.0**-53)[:count]

    def stream(self, seed: int) -> PhiloxStream:
        return PhiloxStream(seed, self.distribution, self.backend)
