"""metazo bench: what it says at its end, after a signal, of a file that it cannot add to, and of threads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metazo.bench import suites
from metazo.errors import UserError


def _one(environment: dict, suites: object) -> str:
    return json.dumps({"format": 2, "processors": [{"environment": environment, "suites": suites}]})


WHOLE = dict.fromkeys(("cpu", "device", "dtype", "python", "torch", "transformers", "numba"), "a") | {"cores": 2}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (_one({}, {"steps": 1}), "`cpu` of `environment` is None"),
        (_one(WHOLE | {"torch": 2}, {}), "`torch` of `environment` is 2"),
        (_one(WHOLE, {"steps": 1}), "suite steps is 1"),
        (_one(WHOLE, {"steps": {"one": []}}), r"steps/one is \[\]"),
        (_one(WHOLE, {"steps": {"one": {"date": "", "load": [], "rows": 1}}}), "`rows` of steps/one is 1"),
        (
            _one(WHOLE, {"steps": {"one": {"date": "", "load": [], "rows": [{}]}}}),
            "`case` of a row of steps/one is None",
        ),
        (
            _one(WHOLE, {"steps": {"one": {"date": "", "load": [], "rows": [{"case": "a", "ratio": {}}]}}}),
            "`median` of `ratio` of a in steps/one is None",
        ),
    ],
)
def test_figures_that_no_table_can_show_are_refused_before_anything_is_measured(text: str, found: str, tmp_path: Path):
    """The bench measured, and ended in a KeyError when it made the tables."""
    (tmp_path / "speed.json").write_text(text)
    with pytest.raises(UserError, match=f"cannot be read as figures of metazo bench: {found}"):
        suites.run([suites.Part("steps", "one", lambda tick: pytest.fail("measured"))], tmp_path, suites.Settings(True))
