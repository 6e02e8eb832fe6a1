"""CurvZO as the authors released it (a port of their anonymous release).

Differences from the rule of metazo/optimizers/curvzo.py: pi ~ S, not sqrt(S), with an upper bound on kappa under which only
the largest pi is ever capped, so that the sum misses the budget; no floor; an empty mask is replaced by the most likely
tensor at weight 1 / pi; the score is |c| / EMA|c| times the tensor's share of |z_b|^2 / pi_b^2, which differs between
tensors that take part only by their sizes and by chance; weight decay acts only on tensors that take part. The mask's
uniform numbers are drawn before the step's seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch

from metazo.blocks import NamedTensor
from metazo.optimizers.base import State
from metazo.optimizers.curvzo import CurvZO
from metazo.optimizers.registry import official
from metazo.step.directions import Direction


def probabilities(scores: np.ndarray, fraction: float) -> np.ndarray:
    """The released pi: (M,), float32."""
    count = len(scores)
    p = np.maximum(scores, 1e-12)
    p = p / p.sum()
    target = np.clip(np.floor(count * fraction), 1, count)
    low, high = 0.0, 1.0 / p.max()
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * p).sum() < target else (low, middle)
    return np.minimum(1, low * p).astype(np.float32)


@official(CurvZO)
class OfficialCurvZO(CurvZO):
    first_score, first_magnitude = 0.01, 1e-8

    def __init__(self, *args, floor: float = 0.05, **options):
        if floor not in (0.05, 0.0):
            warnings.warn(
                f"`floor` {floor:g} changes nothing with `compat` official, which has no floor.", stacklevel=2
            )
        super().__init__(*args, floor=min(0.05, options.get("budget", 0.05)), **options)
        self.floor = 0.0
        self.drawn: np.ndarray | None = None  # for the step whose seed is drawn

    def draw_seeds(self, step: int, queries: int) -> list[int]:
        self.drawn = super().uniforms(step)
        return super().draw_seeds(step, queries)

    def uniforms(self, step: int) -> np.ndarray:
        drawn, self.drawn = self.drawn, None
        return super().uniforms(step) if drawn is None else drawn

    def propose(self, state: State, step: int, seeds: Sequence[int]) -> Direction:
        direction = super().propose(state, step, seeds)
        self.taking_part = frozenset(tensor.name for tensor in self.selected(state))
        return direction

    def choose(self, state: State, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pi = probabilities(state["score"].numpy(), float(state["fraction"]))
        selected = uniforms < pi
        if not selected.any():
            selected[pi.argmax()] = True
        return pi, selected

    def inclusion(self, pi: np.ndarray) -> np.ndarray:
        return np.maximum(pi, 1e-8)

    def decays(self, tensor: NamedTensor) -> bool:
        return tensor.name in self.taking_part and super().decays(tensor)

    def size(self, c: float) -> float:
        return abs(c)

    def observed(self, state: State, squares: torch.Tensor, c: float) -> torch.Tensor:
        energy = squares / state["pi"][state["selected"]] ** 2
        return abs(c) / (float(state["magnitude"]) + 1e-12) * energy / energy.sum()
