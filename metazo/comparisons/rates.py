"""The search for a learning rate: a grid in factors of about 3, extended until the best rate is inside it.

The best rate has the lowest loss on dev at the end of its runs, or the lowest objective if they have one, as a mean over the
search's seeds. A grid is used and not a sampler because the loss has one minimum in the learning rate, rises steeply to its
right, and a factor of 3 is finer than the spread over seeds resolves. The cost is counted. Every method gets the same
search, unless a recipe names the rates of a column (`lrs`), which may be closer together.
"""

from __future__ import annotations

import math
from collections.abc import Generator

from metazo.optimizers import METHODS

# A method's class gives the start of its search (`expected_rate`), chosen by hand: a search that starts far from the best
# rate is extended, which costs runs and changes nothing else.


RUNG = 3.5
"""The factor between neighbours on the ladder is at most 10/3."""


def start(optimizer: str, trained: int, energy: float = 1.0) -> list[float]:
    """Three rates around the method's expected best rate.

    Args: trained weights; energy: mean square of the method's direction, by which rates are compared.
    """
    centre = METHODS[optimizer].expected_rate(trained, energy)
    rung = round(2 * math.log10(centre))
    return [_rate(rung + offset) for offset in (-1, 0, 1)]


def _rate(rung: int) -> float:
    """The ladder ..., 1e-4, 3e-4, 1e-3, 3e-3, ..."""
    return float(f"{'13'[rung % 2]}e{rung // 2}")


def beyond(lr: float, up: bool) -> float:
    """The next rate: on the ladder if lr is on it, else three times or a third of lr."""
    rung = round(2 * math.log10(lr))
    if math.isclose(_rate(rung), lr, rel_tol=1e-6):
        return _rate(rung + (1 if up else -1))
    return float(f"{lr * 3 if up else lr / 3:.2g}")


def walk(lrs: list[float], extensions: int) -> Generator[list[float], dict[float, float], tuple[float | None, bool]]:
    """Yields rates to try and is sent their losses (inf if a run failed); returns the best rate and whether it is at a
    boundary: whether all `extensions` were used up before there was a tried rate on both sides of it.

    Of equal losses the smaller rate is taken. If every rate failed, the next one is smaller by a factor of ten, and the rate
    between is tried before the search ends.
    """
    losses: dict[float, float] = {}
    wanted = sorted(lrs)
    for _ in range(extensions + 1):
        losses |= yield wanted
        lr = best(losses)
        if lr is None:
            wanted = [float(f"{min(losses) / 10:.2g}")]
        elif lr in (min(losses), max(losses)):
            wanted = [beyond(lr, lr == max(losses) and len(losses) > 1)]
        elif _gap_above(lr, losses):
            wanted = [beyond(lr, up=True)]
        else:
            return lr, False
    return best(losses), True


def _gap_above(lr: float, losses: dict[float, float]) -> bool:
    """Whether the next rate that was tried failed and is further away than a rung, as after a division by ten."""
    above = min(other for other in losses if other > lr)
    return math.isinf(losses[above]) and above > RUNG * lr


def best(losses: dict[float, float]) -> float | None:
    finite = [lr for lr in sorted(losses) if math.isfinite(losses[lr])]
    return min(finite, key=lambda lr: losses[lr]) if finite else None
