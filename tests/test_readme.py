"""The README and the other pages describe what happens."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "tests/golden/README.md"]


def test_the_example_learns():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None and len(code[1].strip().splitlines()) <= 24
    done = warm.run("-c", code[1])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) >= 0.95


def slug(heading: str) -> str:
    """The anchor of a heading on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in map(slug, re.findall(r"^#+ (.*)$", path.read_text(), re.M)), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`((?:tests|benchmarks|metazo|examples|docs|cli)/[\w/]+\.\w+)", page.read_text()):
        assert (ROOT / name).is_file(), name


def test_the_method_of_contributing_is_the_example():
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert code is not None and code[1] in (ROOT / "examples" / "own_method.py").read_text()


def test_the_memory_that_the_readme_names_was_measured():
    """On all processors: AdamW's least and most at (1, 32) and (8, 64), in multiples of the weights, and MeZO's most."""
    found = json.loads((ROOT / "benchmarks" / "speed.json").read_text())["processors"]
    suites = [suite for each in found for suite in each["suites"].get("memory", {}).values()]
    above: dict[str, list[float]] = {}
    for row in (row for suite in suites for row in suite["rows"]):
        above.setdefault(row["case"], []).append(row["above"] / row["weights"])
    adam, mezo = above["AdamW, first-order"], above["MeZO"]
    said = f"AdamW takes {min(adam):.1f} to {max(adam):.1f} times the memory of the weights beyond inference and MeZO "
    assert f"{said}{max(mezo):.1%}".replace("%", " %") in " ".join(README.split())


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 140


def test_the_table_of_methods_is_that_of_the_probes():
    """Rendered from docs/capabilities.json (benchmarks/capabilities.py), and it has every method."""
    from metazo.optimizers import OPTIMIZERS

    spec = importlib.util.spec_from_file_location("capabilities", ROOT / "benchmarks" / "capabilities.py")
    assert spec is not None and spec.loader is not None
    capabilities = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(capabilities)
    found = json.loads((ROOT / "docs" / "capabilities.json").read_text())
    assert capabilities.rendered(README, found) == README and set(found) == set(OPTIMIZERS)
    probed = capabilities.probe("lozo")
    assert probed == found["lozo"]
