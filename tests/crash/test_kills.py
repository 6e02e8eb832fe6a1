"""A few kills in every run of the suite, at new moments each time; `harness.py` does hundreds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.crash.table import lost


def test_killed_runs_end_in_the_same_bytes(tmp_path):
    seed = time.time_ns() % 2**32
    command = [sys.executable, "-m", "tests.crash.harness", "--kills=8", f"--seed={seed}"]
    command += ["--case=mezo", "--case=lozo-m", "--case=first-order-adamw", "--results", str(tmp_path / "kills.json")]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    rows = json.loads((tmp_path / "kills.json").read_text())["kills"]
    assert len(rows) == 8
    assert all(row["identical"] for row in rows) and not any(map(lost, rows)), (seed, rows)
