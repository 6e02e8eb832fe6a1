"""What a step leaves behind, and what a method says of one: the records of the contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from metazo.step.directions import Direction


@dataclass(frozen=True)
class Step:
    """The record of one step: enough to take it again without a forward pass.

    seeds, coefficients: one a query (coefficients empty where the step was skipped: a loss was not finite); losses: in
    the order of the estimator's probes; lr: of each parameter group; scales: sigma by block where there is a block
    scale, to be read, not needed: they follow from the weights and the losses before.
    """

    step: int
    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    coefficients: tuple[float, ...]
    lr: tuple[float, ...]
    scales: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Update:
    """What a method makes of the losses: c by query, and the direction to update along (None: the probed one).

    terms: (seed, multiple) pairs, the estimate being the sum of multiple * d(seed); None: the step's seeds with c.
    """

    coefficients: Sequence[float]
    direction: Direction | None = None
    terms: Sequence[tuple[int, float]] | None = None
