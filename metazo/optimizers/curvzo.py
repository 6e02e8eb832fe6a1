"""CurvZO (arXiv 2603.21725, ICML 2026): probe few tensors per step, and choose those more often that change the loss more.

Every tensor b is a block that takes part with probability pi_b. A block that takes part is weighted by 1 / pi_b
(Horvitz-Thompson), so that the estimate is unbiased:

    m_b ~ Bernoulli(pi_b),   v_b = m_b z_b,   z_b ~ N(0, I)
    c   = (L(theta + eps v) - L(theta - eps v)) / (2 eps)
    g_b = c v_b / pi_b,      theta <- theta - lr g                                          (Prop. 3.2: E g = gradient)
    s_b = c^2 mean(z_b^2) / EMA(c^2),   S_b <- (1 - beta) S_b + beta s_b   if m_b = 1       (online score)
    pi_b = clip(kappa sqrt(S_b), floor, 1),   kappa such that sum_b pi_b = budget M         (Prop. 3.4, water-filling)
    every 20 steps the budget moves by a tenth towards M (0.1 + 0.7 (0.7 d_eff / M + 0.3 (1 - entropy)))

The mask is drawn given that at least one tensor takes part, because an empty step would waste two forwards; the weight
therefore divides by pi_b / (1 - prod (1 - pi)). Linearised, with d_b entries and gradient g_b,

    E |c v_b / pi_b|^2 = ((d_b + 2) |g_b|^2 + d_b sum_{a != b} pi_a |g_a|^2) / pi_b,

of which MeZO is the case pi = 1. If pi_b grows with |g_b|^2 / d_b, as it does here, the sum over b is never below MeZO's
(Chebyshev's inequality: 1 / pi falls and pi |g|^2 / d grows), and a small pi_b adds variance on tensor b. The floor bounds
this. CurvZO saves a share 1 - budget of the work of probing. Probabilities that fall with the gradient, the opposite of the
paper's, can lower the variance: 95 instead of 202 |g|^2 if one of 20 tensors of 10 entries has the whole gradient and takes
part with 0.25. The scores of all tensors, also of those with a small gradient, contain the same sum pi_a |g_a|^2, so
probabilities differ less than gradients do.

We did not have the paper's text: rule, score and propositions follow summaries of it. `compat="official"` (formerly
`score="release"`) follows a port of the authors' anonymous release step for step; official/curvzo.py lists the differences.
The rule of the budget is the release's in both, because we did not have the paper's Eq. 20.

Where not to use: to reduce variance (see above), or on a few tensors (LoRA on one layer), because the choice is then small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch

from metazo.blocks import NamedTensor, shape_of
from metazo.errors import UserError
from metazo.optimizers.base import State, Update, ZOOptimizer
from metazo.optimizers.registry import Case, register
from metazo.step.directions import Direction, Isotropic, Scaled, Sparse
from metazo.step.terms import Term

BUDGET_RANGE = (0.1, 0.8)  # the range of the adaptive budget


def water_fill(weights: np.ndarray, total: float, floor: float) -> np.ndarray:
    """clip(kappa weights, floor, 1), with kappa such that the sum is total.

    It minimises sum weights^2 / pi over floor <= pi <= 1, sum pi = total. Args: weights: (M,), at least 0; total: clipped to
    M floor .. M. Returns: (M,), float64.
    """
    if total >= len(weights) or not weights.any():
        return np.full(len(weights), np.clip(total / len(weights), floor, 1))
    weights = np.maximum(weights / weights.max(), 1e-12)
    low, high = 0.0, 1.0 / weights.min()
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if np.clip(middle * weights, floor, 1).sum() < total else (low, middle)
    return np.clip(high * weights, floor, 1)


def sample(pi: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Independent inclusions with probabilities pi, conditional on at least one inclusion. Returns: (M,), bool."""
    none_after = np.append(np.cumprod((1 - pi)[::-1])[::-1], 1.0)  # P(nothing from b on)
    selected = np.zeros(len(pi), dtype=bool)
    for b in range(len(pi)):
        selected[b] = uniforms[b] < (pi[b] if selected[:b].any() else pi[b] / (1 - none_after[b]))
    return selected


def next_fraction(scores: np.ndarray, fraction: float, floor: float) -> float:
    """The budget moved by a tenth towards effective support and flatness of the scores, within BUDGET_RANGE."""
    count, mean = len(scores), scores.mean()
    if not mean > 0:  # no step has told tensors apart
        return fraction
    v = scores / mean
    effective = np.sqrt(v).sum() ** 2 / v.sum()
    p = v / v.sum()
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum() / math.log(count) if count > 1 else 1.0
    wanted = 0.1 + 0.7 * (0.7 * effective / count + 0.3 * (1 - entropy))
    return float(np.clip(0.9 * fraction + 0.1 * wanted, max(BUDGET_RANGE[0], floor), max(BUDGET_RANGE[1], floor)))


@register
class CurvZO(ZOOptimizer):
    """Sparse two-point descent with learned inclusion probabilities.

    Forwards per step: 2, with a part of the tensors perturbed. Extra memory: three numbers per tensor. State: score, pi (M,);
    selected (M,), bool; fraction (the budget), magnitude (the moving average of c^2), scalars.

    Args:
        budget: expected share of the tensors that take part, in (0, 1]; the first value if it adapts.
        floor: smallest probability, in (0, budget]; not in the paper (compat="official" has none).
        beta: weight of a new score in its moving average, in (0, 1].
        magnitude_beta: weight of a new c^2 in the moving average by which scores are divided, in (0, 1].
        adapt_every: steps between changes of the budget; 0 keeps it fixed.
        compat: "paper", or "official" for the published code with its faults.
    """

    name, paper = "curvzo", "arXiv 2603.21725"
    shardable = True
    contract_case = Case(quadratic=0.03, stiff=4e-4)
    first_score, first_magnitude = 1.0, 0.0
    """S_b and the moving average of c^2 at the start."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        budget: float = 0.4,
        floor: float = 0.05,
        beta: float = 0.1,
        magnitude_beta: float = 0.1,
        adapt_every: int = 20,
        compat: Literal["paper", "official"] = "paper",
        **common,
    ):
        common.pop("score", None)  # see `translate`
        if not 0 < budget <= 1:
            raise UserError(f"`budget`, the share of tensors that take part, must be in (0, 1], not {budget}.")
        if not 0 < floor <= budget:
            raise UserError(f"`floor` must be in (0, budget], here (0, {budget}], not {floor}.")
        for name, value in {"beta": beta, "magnitude_beta": magnitude_beta}.items():
            if not 0 < value <= 1:
                raise UserError(f"`{name}` must be in (0, 1], not {value}.")
        if not isinstance(adapt_every, Integral) or adapt_every < 0:
            raise UserError(f"`adapt_every` must be a whole number of at least 0, not {adapt_every}.")
        self.budget, self.floor, self.adapt_every = budget, floor, adapt_every
        self.beta, self.magnitude_beta = beta, magnitude_beta
        super().__init__(params, lr, eps, **common)

    @classmethod
    def translate(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The former name of compat="official" was `score="release"`."""
        options = dict(options)
        score = options.pop("score", "paper")
        if score not in ("paper", "release"):
            raise UserError(f"`score` {score!r} is unknown: choose `compat` paper or official instead.")
        return options | ({"compat": "official"} if score == "release" else {})

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        def numbers(value: float, *shape: int) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.float64)

        count = len(tensors)
        return {
            "score": numbers(self.first_score, count),
            "pi": numbers(1.0, count),
            "selected": torch.ones(count, dtype=torch.bool),
            "fraction": numbers(self.budget),
            "magnitude": numbers(self.first_magnitude),
        }

    def uniforms(self, step: int) -> np.ndarray:
        """The numbers in [0, 1) that choose the tensors of a step, (M,), float64."""
        return self.noise.uniform(step, len(self.tensors))

    def propose(self, state: State, step: int, seeds: Sequence[int]) -> Direction:
        pi, selected = self.choose(state, self.uniforms(step))
        state["pi"].copy_(torch.from_numpy(pi))
        state["selected"].copy_(torch.from_numpy(selected))
        return self.sparse(state)

    def choose(self, state: State, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inclusion probabilities and the tensors that take part, (M,) each."""
        pi = water_fill(np.sqrt(state["score"].numpy()), float(state["fraction"]) * len(uniforms), self.floor)
        return pi, sample(pi, uniforms)

    def sparse(self, state: State) -> Sparse:
        return Sparse(Isotropic(), [tensor.name for tensor in self.selected(state)])

    def selected(self, state: State) -> list[NamedTensor]:
        return [tensor for tensor, taken in zip(self.tensors, state["selected"].tolist()) if taken]

    def inclusion(self, pi: np.ndarray) -> np.ndarray:
        """The probability by which the estimate of a tensor that takes part is divided."""
        return pi / (1 - np.prod(1 - pi))

    def update(self, state: State, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        (c,) = self.estimator.coefficients(losses, self.eps)
        pi = state["pi"].numpy()
        self.learn(state, seeds[0], c)
        if self.adapt_every and step % self.adapt_every == 0:
            state["fraction"].fill_(next_fraction(state["score"].numpy(), float(state["fraction"]), self.floor))
        weights = {tensor.name: 1 / p for tensor, p in zip(self.tensors, self.inclusion(pi).tolist())}
        return Update([c], [Term(Scaled(self.sparse(state), weights), seeds[0], c)])

    def learn(self, state: State, seed: int, c: float) -> None:
        """Scores of the tensors that took part."""
        magnitude, stream = state["magnitude"], self.noise.stream(seed)
        new = torch.as_tensor(self.size(c), dtype=torch.float32, device="cpu").to(magnitude)
        if not new.isfinite():
            raise OverflowError
        magnitude.lerp_(new, self.magnitude_beta if magnitude > 0 else 1.0)
        squares = torch.tensor(
            [stream.square(tensor) for tensor in self.selected(state)], dtype=torch.float64, device="cpu"
        )
        taken, observed = state["selected"], self.observed(state, squares, c)
        state["score"][taken] = (1 - self.beta) * state["score"][taken] + self.beta * observed

    def size(self, c: float) -> float:
        """The number whose moving average divides the scores."""
        return c**2

    def observed(self, state: State, squares: torch.Tensor, c: float) -> torch.Tensor:
        """s_b of the tensors that took part, from their |z_b|^2."""
        sizes = torch.tensor([shape_of(tensor.param).numel() for tensor in self.selected(state)], device="cpu")
        return squares / sizes * (c**2 / max(float(state["magnitude"]), 1e-300))
