"""Surrogates of the error in the residual stream, which replace dL/d(output of block l).

With delta the exact error after the last block and J_l the Jacobian of block l,

    exact      e_l = e_{l+1} J_{l+1}                    at every position: backpropagation, one block at a time
    column     e_l = C (e_{l+1} J_{l+1})                C keeps the positions at which delta is not zero
    skip       e_l = delta                              the Jacobian of later blocks is taken as the identity
    feedback   e_l = t_l (delta + (delta V_l) U_l)      a mean Jacobian, identity plus low rank, learned once per model

If every position contributes to the loss, C is the identity and `column` is `exact`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from metazo.errors import UserError


class Surrogate(Protocol):
    chained: bool
    """Whether the error propagated through the next block is needed; if so, every block after a trained one runs again."""

    def error(self, index: int, delta: Tensor, pulled: Tensor) -> Tensor:
        """Error (B, T, d) at the output of block `index`. pulled: the error at the next block's input; delta for the last."""
        ...


@dataclass(frozen=True)
class Skip:
    """delta itself. Source: the residual form of direct feedback (Nokland 2016, arXiv 1609.01596) with identity weights."""

    chained = False

    def error(self, index: int, delta: Tensor, pulled: Tensor) -> Tensor:
        return delta


@dataclass(frozen=True)
class Column:
    """Exact along the positions that contribute to the loss; errors at all other positions are left out."""

    chained = True

    def error(self, index: int, delta: Tensor, pulled: Tensor) -> Tensor:
        return pulled * delta.ne(0).any(-1, keepdim=True)


@dataclass(frozen=True)
class Exact:
    """Backpropagation with one block's graph at a time; the reference for all other surrogates."""

    chained = True

    def error(self, index: int, delta: Tensor, pulled: Tensor) -> Tensor:
        return pulled


@dataclass(frozen=True)
class MeanJacobian:
    """t_l (delta + (delta V_l) U_l): `down` holds V_l (d, r) and `up` U_l (r, d) by block index, `trust` t_l.

    A block without an entry gets delta itself, which is exact for the last block.
    """

    down: Mapping[int, Tensor]
    up: Mapping[int, Tensor]
    trust: Mapping[int, float]
    chained = False

    def error(self, index: int, delta: Tensor, pulled: Tensor) -> Tensor:
        down = self.down.get(index)
        if down is None:
            return delta
        if down.shape[0] != delta.shape[-1]:
            raise UserError(
                f"The feedback matrices have width {down.shape[0]}, the model has {delta.shape[-1]}: fit them for this model."
            )
        return self.trust[index] * (delta + (delta @ down.to(delta)) @ self.up[index].to(delta))
