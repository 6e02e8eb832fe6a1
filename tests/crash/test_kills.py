"""A few kills in every run of the suite, at new moments each time; `harness.py` does hundreds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from tests import warm
from tests.crash.table import lost


def test_killed_runs_end_in_the_same_bytes(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    seed = time.time_ns() % 2**32
    command = ["-m", "tests.crash.harness", "--kills=8", f"--seed={seed}", f"--model={tiny('llama')}"]
    command += ["--case=mezo", "--case=lozo-m", "--case=first-order-adamw", "--results", str(tmp_path / "kills.json")]
    root = Path(__file__).parents[2]
    done = warm.run(*command, cwd=root)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    rows = json.loads((tmp_path / "kills.json").read_text())["kills"]
    assert len(rows) == 8
    assert all(row["identical"] for row in rows) and not any(map(lost, rows)), (seed, rows)
