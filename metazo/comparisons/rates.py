"""The search for a learning rate: a grid in factors of about 3, extended until the best rate is inside it.

The best rate has the lowest loss on dev at the end of its runs, or the lowest objective if they have one, as a mean over the
search's seeds. A grid is used and not a sampler because the loss has one minimum in the learning rate, rises steeply to its
right, and a factor of 3 is finer than the spread over seeds resolves. The cost is counted. Every method gets the same
search, unless a recipe names the rates of a column (`lrs`), which may be closer together.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from statistics import fmean

from metazo.comparisons.columns import Column
from metazo.comparisons.grid import SEARCH_SEED, Grid, Run, search_run
from metazo.comparisons.results import Result, Search
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
    """Yields rates to try and is sent their losses (inf if a run diverged); returns the best rate and whether it is at a
    boundary: whether all `extensions` were used up before there was a tried rate on both sides of it, and none far above it
    that diverged. Without any finite loss there is no best rate, and no boundary.

    Of equal losses the smaller rate is taken, and one inside the range before one at its edge: nothing says that the best is
    beyond. If every rate diverged, the next one is smaller by a factor of ten, and the rate
    between is tried before the search ends.
    """
    losses: dict[float, float] = {}
    wanted = sorted(lrs)
    for _ in range(extensions + 1):
        losses |= yield wanted
        lr = best(losses)
        if lr is None:
            wanted = [float(f"{min(losses) / 10:.2g}")]
        elif doubtful(lr, losses):
            wanted = [beyond(lr, up=lr > min(losses))]
        else:
            return lr, False
    lr = best(losses)
    return lr, lr is not None


def doubtful(lr: float, losses: dict[float, float]) -> bool:
    """Whether a better rate than the best one may have been missed: it is the smallest or largest tried, or below a gap."""
    return lr in (min(losses), max(losses)) or _gap_above(lr, losses)


def _gap_above(lr: float, losses: dict[float, float]) -> bool:
    """Whether the next rate that was tried diverged and is further away than a rung, as after a division by ten."""
    above = min(other for other in losses if other > lr)
    return math.isinf(losses[above]) and above > RUNG * lr


def best(losses: dict[float, float]) -> float | None:
    finite = [lr for lr in sorted(losses) if math.isfinite(losses[lr])]
    return min(finite, key=lambda lr: (losses[lr], lr in (min(losses), max(losses)))) if finite else None


def look(
    grid: Grid, task: str, column: Column, start: list[float], failed_too: bool = False
) -> Generator[list[Run], list[Result], tuple[Search | None, list[Run]]]:
    """Search a column's learning rate: yields runs, and is sent their results. Returns the search and all its runs.

    start: the first rates; a single one is taken without a run. The search is None if a run has failed and not diverged, as
    for lack of memory: that tells nothing about its rate, so that no rate may be chosen. failed_too: it is a bad rate, as to
    earlier versions.
    """
    if len(start) == 1:
        return Search(start[0], {}, False, [], 0, 0, 0), []
    seeds = [SEARCH_SEED + number for number in range(grid.search_seeds)]
    search = Search(None, {}, False, seeds, 0, 0, search_run(grid, task, column, start[0], 0).forwards)
    used, walker = list[Run](), walk(start, grid.extensions)
    wanted = next(walker)
    while True:
        runs = [search_run(grid, task, column, lr, seed) for lr in wanted for seed in seeds]
        results = yield runs
        used += runs
        if not failed_too and not all(result.finished or result.diverged for result in results):
            return None, used
        losses = {lr: fmean(r.minimised for r in results if r.run_info["lr"] == lr) for lr in wanted}
        search.losses |= {f"{lr:g}": loss if math.isfinite(loss) else None for lr, loss in losses.items()}
        search.runs += len(results)
        search.forwards += sum(result.train_info.get("forwards") or 0 for result in results)
        try:
            wanted = walker.send(losses)
        except StopIteration as stop:
            search.lr, search.at_boundary = stop.value
            return search, used
