"""LOZO and LOZO-M as published, with the faults that metazo/optimizers/lozo.py numbers.

The update restarts the step's stream. If V was drawn from it before U, the update's U and z are therefore numbers that
were never probed; with Philox noise, they are those of another seed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from metazo.errors import UserError
from metazo.noise import TorchOrderNoise
from metazo.optimizers.base import State, Update
from metazo.optimizers.lozo import LOZO, LOZOM, folder
from metazo.optimizers.registry import official
from metazo.step.directions import Isotropic
from metazo.step.lowrank import LowRank
from metazo.step.terms import Term


@official(LOZO)
class OfficialLOZO(LOZO):
    def __init__(self, *args, queries: int = 1, **options):
        if queries > 1:
            raise UserError(f"`queries` is {queries} and the published code has 1: choose 1, or `compat` paper.")
        super().__init__(*args, queries=queries, **options)

    def check_rank(self, name: str, side: int) -> None:
        pass

    def is_matrix(self, param: Tensor) -> bool:
        return param.ndim > 1

    def update_seed(self, state: State, step: int, seed: int) -> int:
        """The seed of the noise along which the update moves (fault 1)."""
        if step % self.interval:
            return seed
        if not isinstance(self.noise, TorchOrderNoise):
            return self.noise.seed(step, 1)
        self.weights.leave()  # the probe is removed with the noise with which it was applied
        self.noise.forget(seed)
        direction = LowRank(Isotropic(), folder(state, "V"))
        self.noise.expect(seed, (draw for tensor in self.tensors for draw in direction.draws(tensor)))
        return seed

    def update(self, state: State, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        (c,) = self.estimator.coefficients(losses, self.eps)
        direction = LowRank(Isotropic(), folder(state, "V"))
        return Update([c], [Term(direction, self.update_seed(state, step, seeds[0]), c)])


@official(LOZOM)
class OfficialLOZOM(OfficialLOZO, LOZOM):
    def starts_anew(self, state: State, matrix: bool) -> bool:
        return super().starts_anew(state, matrix) or (matrix and self.interval == 1)  # fault 2

    def update(self, state: State, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        return LOZOM.update(self, state, step, [self.update_seed(state, step, seeds[0])], losses)
