"""LOREN as published, with faults 1 to 7 of metazo/optimizers/loren.py: one reflected direction per tensor, a score so small
that a does not change in float32, momentum applied once per query, a that changes between queries, and weight decay on
every tensor. The rows of a tensor of more than two dimensions, on which the published code fails, are as in that file."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.optimizers.base import State, Update
from metazo.optimizers.loren import LOREN, Vectors, row_length, score
from metazo.optimizers.registry import official
from metazo.step.directions import Direction, Isotropic, Reflected
from metazo.step.estimators import mean
from metazo.step.rules import SGD, Momentum, Rule
from metazo.step.terms import Term


class MatrixMomentum(Momentum):
    """Heavy ball on tensors of two dimensions, plain descent on the others, as published."""

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        return super().init([tensor for tensor in tensors if tensor.param.ndim > 1])

    def apply(self, tensor, start, theta, add, lr, decay, state) -> None:
        rule = super() if tensor.param.ndim > 1 else SGD()
        rule.apply(tensor, start, theta, add, lr, decay, state)


class Tiled(Vectors):
    def __call__(self, tensor: NamedTensor) -> Tensor:
        return super().__call__(tensor).repeat(tensor.param.numel() // row_length(tensor))


@official(LOREN)
class OfficialLOREN(LOREN):
    shardable = False  # one direction per tensor, and a that is read and changed between queries

    def heavy_ball(self, momentum: float) -> Rule:
        return MatrixMomentum(momentum)

    def propose(self, state: State, step: int, seeds: Sequence[int]) -> Direction:
        """a is tiled over the rows, and read when the direction is drawn, so that a query uses the a of the ones before."""
        return Reflected(Isotropic(), Tiled(state), self.damping)

    def update(self, state: State, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        rounded = torch.tensor([*losses, mean(losses)], dtype=torch.float32, device="cpu")
        return Update(((rounded[:-1] - rounded[-1]).double() / (self.eps * (len(losses) - 1))).tolist())

    def decays(self, tensor: NamedTensor) -> bool:
        return True

    def _begun(self, terms: list[Term], coefficients: Sequence[float]) -> list[Term]:
        return terms  # the rule begins with each query

    def _apply(self, terms: list[Term], learning_rates: Sequence[float]) -> None:
        """Apply each query, then its step of a."""
        self.weights.leave()
        for term in terms:
            super()._apply(super()._begun([term], [term.amount]), learning_rates)
            stream, direction = self.noise.stream(term.seed), self.propose(self.zo_state, self.steps, [term.seed])
            for tensor in self.tensors:
                a = self.zo_state[f"a/{tensor.name}"]
                d = direction.draw(stream, tensor, a.dtype).view(1, -1)
                lost = score(d, a.repeat(d.numel() // len(a)), self.damping) * (self.eps**2 * math.sqrt(self.damping))
                shift = lost.view(tensor.param.shape).sum(0).view(-1)  # one number if the tensor has one dimension
                decay = self.lr_cov * float(self.param_groups[tensor.group]["weight_decay"])
                a.mul_(1 - decay).sub_(shift, alpha=self.lr_cov * term.amount * self.eps)
