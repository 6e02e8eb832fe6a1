"""One try of a few situations in every run of the suite; `situations.py` does hundreds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

NAMES = (
    "two `finetune --resume` at once",
    "another config.json (resume, replay, meta-train, `--trajectory`)",
    "another task file or data (resume)",
    "another header, nan or inf in a log (replay)",
)


def test_situations_end_as_promised(tmp_path: Path) -> None:
    seed = time.time_ns() % 2**32
    command = [sys.executable, "-m", "tests.crash.situations", "--tries=1", f"--seed={seed}"]
    command += [*(f"--only={name}" for name in NAMES), "--results", str(tmp_path / "found.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    assert f"| all | {len(NAMES)} | {len(NAMES)} |" in done.stdout, (seed, done.stdout)
