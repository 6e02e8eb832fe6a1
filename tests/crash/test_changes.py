"""Some of the kills of `changes.py` at every run of the suite, at others each time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests import warm


def test_a_run_killed_at_any_change_of_a_file_ends_in_the_same_bytes(tiny: Callable[[str], Path]) -> None:
    offset = time.time_ns() % 10**6
    command = ["-m", "tests.crash.changes", "--case=fzoo", "--case=mezo-momentum", "--stride=14", f"--offset={offset}"]
    command.append(f"--model={tiny('llama')}")
    done = warm.run(*command, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, (offset, done.stdout, done.stderr[-2000:])
    assert done.stdout.count("bit-identical []") == 2
