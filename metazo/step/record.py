"""What a step leaves behind, and what a method says of one: the records of the contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from metazo.step.weights import Term


@dataclass(frozen=True)
class Step:
    """The record of one step: enough to take it again without a forward pass.

    seeds, coefficients: one per query (coefficients are empty if the step was skipped: a loss was not finite); losses:
    in the order of the estimator's probes; lr: of each parameter group; scales: sigma by block if there is a block
    scale, for people: a replay does not need them, they follow from the weights and the losses before.
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
    """What a method makes of the losses: c by query, and the terms whose sum is the estimate.

    terms: None for the usual sum of c_k d(seed_k) along the proposed direction; a term with direction None is along it.
    """

    coefficients: Sequence[float]
    terms: Sequence[Term] | None = None
