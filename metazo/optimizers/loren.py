"""LOREN (arXiv 2511.07971, AAAI 2026): noise with a learned covariance that avoids the stiff input direction of each layer.

A tensor of m rows, each of n entries, is probed along d = B u, with the rows of u from N(0, I_n). Each row of d has the
covariance rho H^-1, and H = rho I_n + a a^T is a curvature model with one learned vector a per tensor:

    B u = u - (1 + sqrt(rho / (rho + s))) a (a.u) / s,       s = |a|^2            (B B^T = rho H^-1)
    f_k = L(theta + eps B u_k),  k = 1 .. K,                  mean f = sum_k f_k / K
    g   = sum_k (f_k - mean f) / (eps (K - 1)) B u_k          (leave one out)
    b   <- beta b + g,   theta <- theta - lr b                (heavy ball, once per batch)
    a   <- a - lr_cov / m sum_k (f_k - mean f) / (K - 1) grad_a log p(B u_k)
    grad_a log p(d) = m a / (rho + s) - sum_i (a.d_i) d_i / rho,    d_i the rows of d

The score is that of the Gaussian density, without the factor eps^2 of the published code. Division by m comes from the
natural gradient (m rows inform about one a), so that one lr_cov suits all tensors. a follows -d/da E L(theta + eps B u), a
second-order effect: its signal is eps^2 times the curvature, and its noise is eps times the slope. So a learns if eps is
large or the slope small, at an lr_cov of order 1 / (eps^2 curvature). In 300 steps with K = 12, eps 0.1, lr_cov 0.2 and
rho 1, at a minimum, its cosine with the one stiff direction of 8 rose from 0.16 and 0.36 to above 0.95. At the published
1e-3 it hardly changes.

Differences from the published code; `compat="official"` (official/loren.py) brings back the numbered ones:
 1. It has one global dot product per tensor (a tiled over the rows), which reflects one direction of R^(m n), not one per row.
 2. Its score carries eps^2 sqrt(rho), so that in float32 a never changes.
 3. Momentum decays and the whole buffer is applied once per query, K times per batch, except for tensors of one dimension.
 4. Queries are applied in turn and a changes between them, so B u_k is not exactly the direction that was probed.
 5. In a tensor of one dimension the score is summed to one number that moves all of a.
 6. Weight decay acts on every tensor and on a, once per query (its default is 0.01, here 0).
 7. The losses and their mean are rounded to float32 before they are subtracted.
It runs on CUDA only and fails on tensors of more than two dimensions; here a row is then all but the first dimension.
Evaluation mode, dtypes and weight decay (MeZO's name rule) are by default as in the other methods.

Where not to use: if K one-sided forwards are too many (K = 6 costs as much as three MeZO steps), or if a copy of the weights
for momentum is too much (momentum=0 saves it). Under Rademacher noise the Gaussian score is an approximation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, chunks, shape_of
from metazo.errors import UserError
from metazo.noise import INITIAL, Stream
from metazo.optimizers.base import State, Update, ZOOptimizer
from metazo.optimizers.registry import Case, register
from metazo.optimizers.returned import check_reached
from metazo.step.directions import Direction, Isotropic, Reflected
from metazo.step.estimators import LeaveOneOut
from metazo.step.rules import SGD, Momentum, Rule


def score(d: Tensor, a: Tensor, damping: float) -> Tensor:
    """grad_a log p(d) for rows of d drawn from N(0, rho (rho I + a a^T)^-1). d: (m, n); a: (n,). Returns: (n,)."""
    return len(d) / (damping + a @ a) * a - (d.t() @ (d @ a)) / damping


def drawn_rows(direction: Direction, stream: Stream, tensor: NamedTensor, like: Tensor) -> Iterator[Tensor]:
    """d of a tensor as rows of `like`'s length and dtype, a few at a time: (rows, n)."""
    tensor = tensor.entire
    ranges: list[tuple[int, int | None]] = [(0, None)]
    if tensor.param.ndim > 1:
        ranges = [(start, stop - start) for start, stop in chunks(tensor.param)]
    for start, count in ranges:
        yield direction.draw(stream, tensor, like.dtype, start, count).view(-1, len(like))


def row_length(tensor: NamedTensor) -> int:
    """Entries of a row: n of an (m, n) matrix; all of a tensor of one dimension. Those of the whole tensor, of a shard too."""
    shape = shape_of(tensor.param)
    return max(shape[1 if len(shape) > 1 else 0 :].numel(), 1)


@dataclass(frozen=True, eq=False)
class Vectors:
    """Gives a of a tensor from a state. It is pickled and copied with an optimizer whose last step waits for its record."""

    state: State

    def __call__(self, tensor: NamedTensor) -> Tensor:
        return self.state[f"a/{tensor.name}"]


@register
class LOREN(ZOOptimizer):
    """Leave-one-out descent under a learned low-rank covariance.

    Forwards per step: queries. Extra memory: one copy of the weights for momentum (none at momentum 0), and a row of each
    tensor. State: a/<tensor>, (row,); momentum/<tensor>.

    Args:
        queries: losses per step, at least 2; 6 in the paper, 10 in its command line.
        damping: rho > 0, the curvature that is assumed at first; 0.1 in the paper, 1.0 in its command line.
        lr_cov: learning rate of a, the learned vector of each tensor; 0 keeps its first value and saves a pass per query.
        momentum: heavy-ball factor, 0 for none.
        compat: "paper", or "official" for the published code with its faults.
    """

    name, paper = "loren", "arXiv 2511.07971"
    shardable = True
    contract_case = Case(quadratic=0.02, stiff=4e-4, llama=2e-4, saddle=0.2, options={"queries": 4})

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        queries: int = 6,
        damping: float = 0.1,
        lr_cov: float = 1e-3,
        momentum: float = 0.9,
        compat: Literal["paper", "official"] = "paper",
        **common,
    ):
        if not (math.isfinite(damping) and damping > 0):
            raise UserError(f"`damping` must be a finite number above 0, not {damping}.")
        if not (math.isfinite(lr_cov) and lr_cov >= 0):
            raise UserError(f"`lr_cov` must be a finite number of at least 0, not {lr_cov}.")
        self.estimator = LeaveOneOut(queries)
        self.damping, self.lr_cov = damping, lr_cov
        if common.get("rule") is not None and momentum != 0.9:
            warnings.warn(
                f"`momentum` {momentum:g} changes nothing: it is that of loren's own rule, which `rule` replaces.",
                stacklevel=2,
            )
        if common.get("rule") is None:
            common["rule"] = self.heavy_ball(momentum) if momentum else SGD()
        super().__init__(params, lr, eps, **common)

    def heavy_ball(self, momentum: float) -> Rule:
        return Momentum(momentum)

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        stream = self.noise.stream(self.noise.run_seed)
        state = {}
        for tensor in tensors:
            wide = torch.promote_types(tensor.param.dtype, torch.float32)
            state[f"a/{tensor.name}"] = stream.draw(tensor, (row_length(tensor),), purpose=INITIAL, dtype=wide)
        return state

    def propose(self, state: State, step: int, seeds: Sequence[int]) -> Direction:
        probed = {name: state[name].clone() for name in (f"a/{tensor.name}" for tensor in self.tensors)}
        return Reflected(Isotropic(), Vectors(probed), self.damping)

    def update(self, state: State, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        coefficients = self.estimator.coefficients(losses, self.eps)
        check_reached(coefficients)
        direction, streams = self.propose(state, step, seeds), [self.noise.stream(seed) for seed in seeds]
        for stream in streams if self.lr_cov else ():
            stream.prepare(draw for tensor in self.tensors for draw in direction.draws(tensor))
        for tensor in self.tensors if self.lr_cov else ():
            a = state[f"a/{tensor.name}"]
            total = torch.zeros_like(a)
            for c, stream in zip(coefficients, streams):
                for d in drawn_rows(direction, stream, tensor, a):
                    total.add_(score(d, a, self.damping), alpha=c * self.eps * len(a) / shape_of(tensor.param).numel())
            a.sub_(total, alpha=self.lr_cov)
        return Update(coefficients)
