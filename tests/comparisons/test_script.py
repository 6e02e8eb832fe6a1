"""A comparison that a user's script starts: workers do not run the script again, unless it has a method that they need."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import metazo
from metazo.comparisons.script import needs_script
from metazo.errors import UserError
from metazo.optimizers import METHODS
from tests import warm

COMPARE = """
SETTINGS = {"train_examples": 8, "dev_examples": 4, "test_examples": 4, "batch_size": 2}
def compare(column):
    grid = metazo.Grid(MODEL, ["pico_sentiment"], [column], 4, "out", seeds=1, lrs=[1e-3], extensions=0, config=SETTINGS)
    done = metazo.compare(grid)
    print("done", done["runs"], "failed", done["failed"])
"""
OWN = """
from metazo.optimizers.registry import register

@register
class InScript(metazo.MeZO):
    name = "in-script"
"""


@pytest.mark.parametrize(
    "text",
    [COMPARE + "compare('mezo')\n", OWN + COMPARE + "if __name__ == '__main__':\n    compare('in-script')\n"],
    ids=["without a guard", "with a method of its own"],
)
def test_a_script_compares(tiny: Callable[[str], Path], tmp_path: Path, text: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import metazo\nMODEL = {json.dumps(str(tiny('llama')))}\n{text}")
    done = warm.run(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done 1 failed 0\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "a method that workers cannot import: put it into a file, and name that in METAZO_METHODS"),
        (
            "compare(grid)\n",
            "for which workers run script.py too, and there they would start the comparison again: put",
        ),
    ],
)
def test_a_method_that_workers_cannot_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, said: str
) -> None:
    class Here(metazo.MeZO):
        name = "here"

    monkeypatch.setitem(METHODS, "here", Here)
    main = ModuleType("__main__")
    if text is not None:
        (tmp_path / "script.py").write_text(text)
        main.__file__ = str(tmp_path / "script.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    grid = metazo.Grid("pico", ["pico_sentiment"], ["mezo", "here"], 8, tmp_path / "out", seeds=1, lrs=[1e-3])
    with pytest.raises(UserError, match=said):
        metazo.compare(grid)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("METAZO_METHODS", __file__)
    assert not needs_script(grid)
