"""The contents and requirements of a wheel: data files, extras, pins."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

from metazo.io.extras import PURPOSES

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=;~! ]", text)[0].lower().replace("_", "-") for text in requirements} - {"metazo"}


def test_every_data_file_is_in_the_wheel():
    """The embedded model, recipes, the report's page and the zoo: each file matches a pattern of package-data."""
    for package, patterns in SETTINGS["tool"]["setuptools"]["package-data"].items():
        for path in (ROOT / package).rglob("*"):
            inside = path.relative_to(ROOT / package)
            if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
                found = [p for p in patterns if fnmatch(str(inside), p) and p.count("/") == len(inside.parts) - 1]
                assert found, f"{package}/{inside} would be left out of the wheel"


APART = {"quant", "ray"}
"""Extras that `all` leaves out: gigabytes of kernels for hardware that most machines do not have, and a cluster's software."""


def test_every_extra_is_in_all_and_every_package_is_pinned():
    extras = SETTINGS["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(PURPOSES) - APART == set(re.findall(r"\w+", everything)) - {"metazo"}
    pinned = names((ROOT / "constraints.txt").read_text().splitlines()[1:])
    wanted = names(SETTINGS["project"]["dependencies"]).union(*(names(packages) for packages in extras.values()))
    assert wanted - pinned <= {"triton"}  # torch pins its own
