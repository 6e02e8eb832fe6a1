"""The cosines of feedback estimates: what they must be where they are known, the table and the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metazo.bench import along_training


def test_cosines_by_depth_site_and_step(tmp_path: Path) -> None:
    ticks: list[None] = []
    rows = along_training.run(tmp_path, quick=True, tick=lambda: ticks.append(None))
    assert rows == json.loads((tmp_path / "feedback.json").read_text())["rows"]
    assert (tmp_path / "feedback.png").read_bytes().startswith(b"\x89PNG")
    last = max(row["block"] for row in rows if row["block"] is not None)
    surrogates = list(dict.fromkeys(row["surrogate"] for row in rows))
    assert surrogates == ["skip", "feedback, rank 16", "column"] and len(ticks) == 1 + 2 * len(surrogates)
    for row in rows:
        assert -1 <= row["cosine"] <= 1.0001
        if row["block"] == last:  # delta is exact at its output
            assert row["cosine"] == pytest.approx(1, abs=1e-3) and row["ratio"] == pytest.approx(1, abs=1e-3)
    whole = {(r["step"], r["surrogate"]): r["cosine"] for r in rows if r["block"] is None and r["site"] == "all"}
    assert all(whole[step, "column"] > whole[step, "skip"] > 0.2 for step in (0, 2))
    assert whole[0, "skip"] != whole[2, "skip"]  # the weights have moved
    table = along_training.table(rows)
    assert len(table) == 6 and all(entry[4].startswith("1.00, ") and entry[4].count(",") == last for entry in table)
