"""A few hundred cases of every kind, and every file made by hand; run.py runs tens of thousands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.run import fuzz, kinds, warm_up

CASES = 150


@pytest.mark.parametrize("name", kinds())
@pytest.mark.parametrize("mode", ["hostile", "bytes", "documents"])
def test_hostile_files_are_refused_in_one_line_or_read(
    name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = kinds()[name]
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(inside / "hf"))
    warm_up(kind, inside)
    outcome = fuzz(kind, mode, 10**9, CASES, inside)  # other cases than those of run.py
    assert not outcome["failures"]
    assert outcome["cases"] == {"hostile": len(kind.hostile), "bytes": CASES, "documents": 100}[mode]
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
