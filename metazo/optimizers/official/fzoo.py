"""FZOO as published (DKmiyan/FZOO, trainer.py): the coefficient is (l_k - l_0) / (K sigma) without eps, sigma divides by
K, and weight decay is left out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from metazo.blocks import NamedTensor
from metazo.optimizers.base import State, Update
from metazo.optimizers.fzoo import FZOO
from metazo.optimizers.registry import official


@official(FZOO)
class OfficialFZOO(FZOO):
    def decays(self, tensor: NamedTensor) -> bool:
        return False

    def update(self, state: State, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        spread = statistics.pstdev(losses[1:])
        if spread == 0:
            return Update([0.0] * len(seeds))
        return Update([c * self.eps / spread for c in self.estimator.coefficients(losses, self.eps)])
