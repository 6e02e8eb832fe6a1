"""ZO-Muon (Lang et al., "Powering up zeroth-order training via subspace gradient orthogonalization", arXiv 2602.17155).

For each matrix W (m x n), with P (m x r) a random orthonormal basis that is kept for `interval` steps:

    P = Q of the QR decomposition of a Gaussian matrix (columns signed so that P is Haar distributed), if step % interval == 0
    c_i = (L(W + eps P Psi_i) - L(W)) / eps,   Psi_i ~ N(0, I), r x n,   i = 1 .. N
    g   = 1/N sum_i c_i Psi_i
    W  <- W - lr (P msign(g) + weight_decay W),    msign(U S V^T) = U V^T

Tensors of one dimension: theta <- theta - vector_rate lr mean_i(c_i z_i). All tensors are perturbed at once, so that the c_i
belong to the whole displacement. E[g] = P^T grad, to O(eps); msign makes all singular directions of the step equally long,
so lr is a length: |P msign(g)| = sqrt(min(r, n)).

Differences from the published code (OPTML-Group/ZO-Muon):
 1. There, every query draws its own P at a step that draws P again, and the update multiplies the sum over all Psi_i by the
    last P: for N > 1 the first step of each interval moves along directions that were not probed. Here all queries share P.
 2. There, P and the Psi_i of all queries are kept from probe to update, in the weights' dtype. Here the Psi_i are drawn
    again from their seeds, and P is float32 at least.
 3. The learning rate of vectors is fixed at 1e-7 there, for every lr. Here it is `vector_rate` times lr.
 4. Newton-Schulz runs in bfloat16 there; here in float32 at least.
 5. A matrix with fewer than `rank` rows gets a basis of all its rows; there it fails.

Where not to use: if the small singular values of the estimate are noise, because msign amplifies them; or to reduce the
dimension of LoRA factors and other matrices with few rows, because P then spans the whole space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, sides_of
from metazo.errors import UserError
from metazo.noise import LEFT, RIGHT, Draw
from metazo.optimizers.base import State, Update, ZOOptimizer
from metazo.optimizers.lozo import folder, zeros
from metazo.optimizers.registry import Case, register
from metazo.step.directions import Direction, Isotropic, Sparse
from metazo.step.estimators import OneSided
from metazo.step.lowrank import Held, Projected
from metazo.step.terms import Term

# Coefficients of the quintic Newton-Schulz iteration of Muon (Jordan et al. 2024): singular values become 0.7 .. 1.2.
QUINTIC, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def newton_schulz(g: Tensor) -> Tensor:
    """About msign(g): the singular vectors of g, with singular values of 0.7 to 1.2. g: (r, n). Zero for zero."""
    a, b, c = QUINTIC
    wide = g if g.shape[0] <= g.shape[1] else g.t()
    x = wide / (wide.norm() + 1e-12)
    for _ in range(ITERATIONS):
        square = x @ x.t()
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide is g else x.t()


def exact_sign(g: Tensor) -> Tensor:
    """msign(g) by a singular value decomposition, without the directions whose singular values are rounding errors."""
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    kept = s > s[0] * max(g.shape) * torch.finfo(g.dtype).eps
    return u[:, kept] @ v[kept]


SIGNS: dict[str, Callable[[Tensor], Tensor]] = {"newton-schulz": newton_schulz, "svd": exact_sign}


def haar_basis(gaussian: Tensor) -> Tensor:
    """Orthonormal columns with the span of a Gaussian matrix, Haar distributed: R's diagonal is made positive."""
    q, r = torch.linalg.qr(gaussian)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)


@register
class ZOMuon(ZOOptimizer):
    """Descent along orthogonalised estimates in random subspaces.

    Forwards per step: queries + 1. Extra memory: rank numbers per row of each matrix, and per column during an update.
    State: P/<tensor>, (m, rank).

    Args:
        rank: r, dimension of the subspace; 64 in the published command for OPT-13B.
        interval: steps between draws of P; 100 in the published command.
        queries: N, one-sided probes per step; 4 in the published command.
        msign: "newton-schulz", or "svd" for the exact one.
        vector_rate: learning rate of tensors of one dimension divided by lr; 1e-5 in the published command (1e-7 at
            lr 1e-2).
    """

    name, paper = "zo-muon", "arXiv 2602.17155"
    low_rank = shardable = True
    proportional = False  # msign makes a step as long for any coefficients
    search_rate = 1e-2
    contract_case = Case(
        quadratic=0.05, stiff=0.03, llama=0.02, saddle=2.0, along="free",
        options={"rank": 2, "interval": 5, "vector_rate": 0.1},
    )  # fmt: skip

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-2,
        eps: float = 1e-3,
        *,
        rank: int = 64,
        interval: int = 100,
        queries: int = 4,
        msign: Literal["newton-schulz", "svd"] = "newton-schulz",
        vector_rate: float = 1e-5,
        **common,
    ):
        for key, value in (("rank", rank), ("interval", interval)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"`{key}` must be a whole number of at least 1, not {value}.")
        if msign not in list(SIGNS):  # a value that cannot be a key, too
            raise UserError(f"`msign` {msign!r} is unknown: choose {' or '.join(SIGNS)}.")
        if not (math.isfinite(vector_rate) and vector_rate >= 0):
            raise UserError(f"`vector_rate` must be a finite number of at least 0, not {vector_rate}.")
        self.rank, self.interval, self.vector_rate = rank, interval, vector_rate
        self.msign, self.sign = msign, SIGNS[msign]
        self.estimator = OneSided(queries)
        super().__init__(params, lr, eps, **common)

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        matrices = [tensor for tensor in tensors if tensor.param.ndim > 1 and min(sides_of(tensor.param)) > 1]
        rows = {tensor: sides_of(tensor.param)[0] for tensor in matrices}
        return {f"P/{tensor.name}": zeros(tensor, (m, min(self.rank, m))) for tensor, m in rows.items()}

    def propose(self, state: State, step: int, seeds: Sequence[int]) -> Direction:
        """Draw P again every `interval` steps, from the stream of the step's first seed."""
        direction = Projected(Isotropic(), folder(state, "P"))
        if step % self.interval == 0:
            stream = self.noise.stream(seeds[0])
            self.noise.expect(seeds[0], self._draws(direction))
            stream.prepare(draw for draw in self._draws(direction) if draw[2] == LEFT)
            for tensor in self.tensors:
                if (basis := direction.basis.get(tensor.name)) is not None:
                    basis.copy_(haar_basis(stream.draw(tensor, tuple(basis.shape), LEFT, basis.dtype)))
        return direction

    def _draws(self, direction: Projected) -> Iterator[Draw]:
        """The published order: P before Psi, tensor by tensor."""
        for tensor in self.tensors:
            if (basis := direction.basis.get(tensor.name)) is not None:
                yield tensor, tuple(basis.shape), LEFT
            yield from direction.draws(tensor)

    def update(self, state: State, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        coefficients = self.estimator.coefficients(losses, self.eps)
        basis, streams = folder(state, "P"), [self.noise.stream(seed) for seed in seeds]
        direction, signs = Projected(Isotropic(), basis), {}
        for stream in streams:
            stream.prepare(draw for tensor in self.tensors for draw in direction.draws(tensor) if draw[2] == RIGHT)
        for tensor in self.tensors:
            if tensor.name in basis:
                dtype = basis[tensor.name].dtype
                g = sum(c * direction.right(stream, tensor, dtype) for c, stream in zip(coefficients, streams))
                signs[tensor.name] = self.sign(g.t()).t()  # type: ignore[union-attr]
        vectors = Sparse(Isotropic(), [tensor.name for tensor in self.tensors if tensor.name not in basis])
        terms = [Term(Held(basis, signs, {}), seeds[0], 1.0)] if signs else []
        return Update(
            coefficients, terms + [Term(vectors, seed, c * self.vector_rate) for seed, c in zip(seeds, coefficients)]
        )
