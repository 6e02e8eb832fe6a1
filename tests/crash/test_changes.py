"""Some of the kills of `changes.py` at every run of the suite, at others each time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


def test_a_run_killed_at_any_change_of_a_file_ends_in_the_same_bytes() -> None:
    offset = time.time_ns() % 10**6
    command = [sys.executable, "-m", "tests.crash.changes", "--case=fzoo", "--case=mezo-momentum", "--stride=14"]
    root, environment = Path(__file__).parents[2], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"--offset={offset}"], cwd=root, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, (offset, done.stdout, done.stderr[-2000:])
    assert done.stdout.count("bit-identical []") == 2
