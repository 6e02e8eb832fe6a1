"""A few hundred cases of every kind, and every file made by hand; run.py runs tens of thousands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.run import fuzz, kind_of, kinds, warm_up


@pytest.mark.parametrize("name", kinds())
@pytest.mark.parametrize("mode", ["hostile", "bytes", "documents"])
def test_hostile_files_are_refused_in_one_line_or_read(
    name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = kind_of(name)
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(inside / "hf"))
    warm_up(kind, inside)
    cases = {"hostile": 1, "bytes": kind.share * 3 // 2, "documents": kind.share * 4}[mode]
    outcome = fuzz(kind, mode, 10**9, cases, inside)  # other cases than those of run.py
    assert not outcome["failures"]
    assert outcome["cases"] == {"hostile": len(kind.hostile), "bytes": cases, "documents": kind.share}[mode]
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
