"""The records of a step: what is logged of it, and the update that a method returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a log is read without torch
    from metazo.step.terms import Term


@dataclass(frozen=True)
class Step:
    """The record of one step, from which the step can be replayed without a forward pass.

    seeds, coefficients: one per query (coefficients are empty if the step was skipped: a loss was not finite); losses:
    in the order of the estimator's probes; lr: of each parameter group; scales: sigma by block if there is a block
    scale, for display: a replay computes them from the weights and the earlier losses.
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
    """A method's update from the losses: c by query, and the terms whose sum is the estimate.

    terms: None for the usual sum of c_k d(seed_k) along the proposed direction, which is also the direction of a term
    whose direction is None.
    """

    coefficients: Sequence[float]
    terms: Sequence[Term] | None = None
