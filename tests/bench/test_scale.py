"""The model of a step that several processes share, and the document that gives its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.scale import predicted

ROOT = Path(__file__).parents[2]


def test_the_model_of_a_step():
    """Without passes and messages the work is divided; with them, their time is added once and 2 (N - 1) times."""
    assert predicted(8, 2, 4.0, 0.0, 0.0) == {"step": 1.0, "exchange": 0.0, "efficiency": 1.0}
    found = predicted(4, 2, 2.0, 0.5, 0.01)
    assert found["step"] == pytest.approx(1.0 + 0.5 + 6 * 0.01) and found["exchange"] == pytest.approx(0.06)
    assert found["efficiency"] == pytest.approx((4.0 + 0.5) / (4 * 1.56))


def test_the_document_has_the_figures_of_the_file():
    found, text = json.loads((ROOT / "benchmarks/scale.json").read_text()), (ROOT / "docs/scale.md").read_text()
    for run in found["runs"]:
        each = [f"{1e3 * run[name]['step']:.0f} ms" for name in ("examples", "probes")]
        line = next(line for line in text.splitlines() if line.startswith(f"| {run['processes']} | {each[0]}"))
        assert each[1] in line and f"{run['probes']['efficiency']:.2f}".removesuffix(".00") in line
    for row in found["cluster"]["8192"]:
        line = next(
            line for line in text.splitlines() if line.startswith(f"| {row['gpus']:,} | {1e3 * row['exchange']:.1f} ms")
        )
        assert f"{row['step']:.2f} s, {row['efficiency']:.2f} |" in line
