"""The results in a folder of a comparison, for the tests that look at them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from metazo.comparisons.packed import read_runs
from metazo.comparisons.results import Result
from metazo.errors import UserError


def read_results(results: Path, *kinds: str) -> Iterator[Result]:
    """`read_runs` of some kinds (by default all) without their paths. Raises UserError for a damaged run, too."""
    for path, result in read_runs(results):
        if isinstance(result, UserError):
            raise result
        if not kinds or path.name.split("-")[0] in kinds:
            yield result
