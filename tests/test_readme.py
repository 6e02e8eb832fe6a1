"""What the README says is what happens."""

from __future__ import annotations

import importlib.util
import json
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


def test_the_table_of_methods_is_that_of_the_probes():
    """Rendered from docs/capabilities.json (benchmarks/capabilities.py), and it has every method."""
    from metazo.optimizers import OPTIMIZERS

    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("capabilities", root / "benchmarks" / "capabilities.py")
    assert spec is not None and spec.loader is not None
    capabilities = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(capabilities)
    found = json.loads((root / "docs" / "capabilities.json").read_text())
    assert capabilities.rendered(README, found) == README and set(found) == set(OPTIMIZERS)
    probed = capabilities.probe("lozo")
    assert probed == found["lozo"]
