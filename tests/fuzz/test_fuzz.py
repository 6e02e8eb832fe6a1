"""A few hundred cases of every kind, and every file made by hand; run.py runs tens of thousands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.run import fuzz, kind_of, kinds, warm_up


@pytest.fixture(scope="module", params=kinds())
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A kind and the folder that it reads in; imports and memory that are needed once are taken."""
    outside = tmp_path_factory.mktemp(request.param)
    inside = outside / "inside"
    inside.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(outside)
        patch.setenv("HF_HOME", str(inside / "hf"))
        found = kind_of(request.param)
        warm_up(found, inside)
        yield found, inside


@pytest.mark.parametrize("mode", ["hostile", "bytes", "documents"])
def test_hostile_files_are_refused_in_one_line_or_read(kind: tuple[Any, Path], mode: str) -> None:
    read, inside = kind
    cases = {"hostile": 1, "bytes": read.share * 3 // 2, "documents": read.share * 4}[mode]
    outcome = fuzz(read, mode, 10**9, cases, inside)  # other cases than those of run.py
    assert not outcome["failures"]
    assert outcome["cases"] == {"hostile": len(read.hostile), "bytes": cases, "documents": read.share}[mode]
    assert [path.name for path in inside.parent.iterdir()] == ["inside"]
