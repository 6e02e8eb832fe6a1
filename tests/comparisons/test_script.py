"""A comparison that a user's script starts: workers do not run the script again, unless it has a method that they need."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import metazo
from metazo.comparisons import script
from metazo.comparisons.script import _guarded, needs_script
from metazo.errors import UserError
from metazo.optimizers import METHODS, registry
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


ARCHITECTURE = """
import json, pathlib, shutil
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

class MyConfig(LlamaConfig):
    model_type = "my-llama"

class MyModel(LlamaForCausalLM):
    config_class = MyConfig

AutoConfig.register("my-llama", MyConfig)
AutoModelForCausalLM.register(MyConfig, MyModel)
if not pathlib.Path("mine").exists():
    shutil.copytree(MODEL, "mine")
    config = json.loads(pathlib.Path("mine/config.json").read_text())
    pathlib.Path("mine/config.json").write_text(json.dumps(config | {"model_type": "my-llama"}))
MODEL = "mine"
"""


@pytest.mark.parametrize(
    "text",
    [
        COMPARE + "compare('mezo')\n",
        OWN + COMPARE + "if __name__ == '__main__':\n    compare('in-script')\n",
        ARCHITECTURE + COMPARE + "if __name__ == '__main__':\n    compare('mezo')\n",
    ],
    ids=["without a guard", "with a method of its own", "with an architecture of its own"],
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


def test_a_method_in_a_package_that_is_named_needs_no_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "named_package"
    package.mkdir()
    (package / "__init__.py").write_text("import named_package.sub\n")
    (package / "sub.py").write_text(
        "import metazo.optimizers.mezo\n" + OWN.replace("metazo.MeZO", "metazo.optimizers.mezo.MeZO")
    )
    monkeypatch.setattr(registry, "METHODS", {**registry.METHODS})
    monkeypatch.setattr(registry, "OPTIMIZERS", {**registry.OPTIMIZERS})
    monkeypatch.setattr(script, "METHODS", registry.METHODS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("METAZO_METHODS", "named_package")
    registry.load()
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    made = metazo.Grid("pico", ["pico_sentiment"], ["in-script"], 8, tmp_path / "out", seeds=1, lrs=[1e-3])
    assert not needs_script(made)


@pytest.mark.parametrize(
    ("text", "guarded"),
    [
        ("if __name__ == '__main__':\n    f()\n", True),
        ("log = get(__name__)\n", False),
        ("if 1:\n    f()\n", False),
        ("(", False),
    ],
)
def test_a_guard_is_found(tmp_path: Path, text: str, guarded: bool) -> None:
    (tmp_path / "script.py").write_text(text)
    assert _guarded(str(tmp_path / "script.py")) == guarded and not _guarded(
        str(tmp_path / "archive.pyz" / "script.py")
    )
