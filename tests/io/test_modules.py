"""A user's file is imported under its stem, and never takes the place of another module."""

from __future__ import annotations

import pickle
import random
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from metazo.io.modules import import_from


@pytest.mark.parametrize("stem", ["random", "antigravity", "sys"])
@patch.dict(sys.modules)
def test_a_file_does_not_replace_a_module_of_its_name(stem: str, tmp_path: Path) -> None:
    """Loaded, importable, and built in. The name is the same at every import, for pickle."""
    path, before = tmp_path / f"{stem}.py", sys.modules.get(stem)
    path.write_text("class Mine:\n    pass\n")
    module = import_from(str(path))
    assert sys.modules.get(stem) is before and random.random() < 1
    assert sys.modules[module.__name__] is module and module.__name__.startswith(f"{stem}_of_file_")
    assert type(pickle.loads(pickle.dumps(module.Mine()))) is module.Mine
    assert import_from(str(path)).__name__ == module.__name__
    (tmp_path / "other").mkdir()
    path = path.rename(tmp_path / "other" / path.name)
    assert import_from(str(path)).__name__ != module.__name__


def test_other_files_have_their_stem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for folder in ("a", "b", "rewards_here"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rewards_here.py").write_text(f"place = {folder!r}\n")
        assert import_from(str(tmp_path / folder / "rewards_here.py")).place == folder
        assert sys.modules["rewards_here"].place == folder
    (tmp_path / "importable.py").write_text("x = 1\n")
    for _ in range(2):
        assert import_from(str(tmp_path / "importable.py")) is sys.modules["importable"]
    import importable  # type: ignore[import-not-found]

    assert import_from(str(tmp_path / "importable.py")) is not importable
