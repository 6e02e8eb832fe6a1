"""One try of a few situations in every run of the suite; `situations.py` does hundreds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests import warm

NAMES = (
    "two `finetune --resume` at once",
    "another config.json (resume, replay, meta-train, `--trajectory`)",
    "another task file or data (resume)",
    "another header, nan or inf in a log (replay)",
)


def test_situations_end_as_promised(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    seed = time.time_ns() % 2**32
    command = ["-m", "tests.crash.situations", "--tries=1", f"--seed={seed}", f"--model={tiny('llama')}"]
    command += [*(f"--only={name}" for name in NAMES), "--results", str(tmp_path / "found.json")]
    done = warm.run(*command, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    assert f"| all | {len(NAMES)} | {len(NAMES)} |" in done.stdout, (seed, done.stdout)
