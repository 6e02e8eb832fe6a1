"""Searches for a learning rate as their runs tell of them: calls of metazo compare for parts of a grid write no search.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from metazo.comparisons.rates import doubtful
from metazo.comparisons.results import LARGEST_LOSS, Result, Search

from .numbers import number, part


def searches_of(
    results: Mapping[tuple[str, str], Sequence[Result]], infos: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Search]]:
    """By task and column. results: of the searches, by task and column; infos: run_info of all runs."""
    found: dict[str, dict[str, Search]] = {}
    for (task, column), runs in results.items():
        reported = [i for i in infos if (i.get("task"), i.get("column"), i.get("kind")) == (task, column, "seed")]
        if (search := search_of(runs, reported)) is not None:
            found.setdefault(task, {})[column] = search
    return found


def search_of(results: Sequence[Result], reported: Iterable[dict[str, Any]]) -> Search | None:
    """The search of a column on a task from its runs, and run_info of the reported runs, which have the rate that it chose.

    None if that is not known: no run is reported yet, reported runs have several rates or one that was not tried, or a run of
    the search failed and did not diverge.
    """
    chosen = {info.get("lr") for info in reported}
    found: dict[float, list[float]] = {}
    for result in results:
        if not (result.finished or result.diverged):
            return None
        rate, dev = number(result.run_info.get("lr")), part(result.metrics, "dev")
        loss = math.inf if result.diverged else number(dev.get("objective", dev.get("loss")))
        if rate is None or loss is None or LARGEST_LOSS < abs(loss) < math.inf:
            return None
        found.setdefault(rate, []).append(loss)
    losses = {rate: fmean(values) for rate, values in sorted(found.items())}
    if (
        len(chosen) != 1
        or (lr := chosen.pop()) not in (None, *losses)
        or (lr is None and math.isfinite(min(losses.values())))
    ):
        return None
    infos = [result.run_info for result in results]
    return Search(
        lr,
        {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in losses.items()},
        lr is not None and doubtful(lr, losses),
        sorted({int(info.get("seed") or 0) for info in infos}),
        len(results),
        sum(int(number(result.train_info.get("forwards")) or 0) for result in results),
        max(int(number(info.get("budget")) or 0) for info in infos),
    )
