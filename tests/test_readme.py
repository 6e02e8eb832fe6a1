"""What the README says is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_learns():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None and len(code[1].strip().splitlines()) <= 24
    done = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) >= 0.95


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
