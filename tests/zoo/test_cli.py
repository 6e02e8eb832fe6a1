"""`metazo zoo` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import pertnn_zoo
from metazo import zoo
from metazo.errors import UserError
from metazo_cli.zoo import app
from tests.zoo.conftest import make_tuner


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "150"})
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_import_push_list_show_pull_verify(tmp_path: Path, home: Path) -> None:
    nets = {"norm.weight": nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1))}
    torch.save(nets, tmp_path / "old.pth")
    out = tmp_path / "new.safetensors"
    assert "1 blocks for org/base" in run("import", tmp_path / "old.pth", "--base-model", "org/base", "--out", out)
    with pytest.raises(UserError, match="exists already"):
        run("import", tmp_path / "old.pth", "--base-model", "org/base", "--out", out)
    assert "published org/base/v1" in run("push", out, "--licence", "MIT")
    assert "org/base/v1" in run("list") and "MIT" in run("list")
    entry = json.loads(run("list", "--json"))[0]
    assert entry["name"] == "org/base/v1" and entry["where"] == "own" and Path(entry["path"]).is_file()
    assert "imported from" in run("show", "org/base")
    assert json.loads(run("show", "org/base", "--json"))["blocks"][0]["name"] == "norm.weight"
    assert Path(json.loads(run("pull", "org/base/v1", "--json"))["path"]).is_file()
    shipped = json.loads((Path(pertnn_zoo.__file__).parent / "index.json").read_text())["tuners"]
    count = len(shipped) + 2  # in the zoo of one's own, and in the cache
    assert f"{count} of {count} in order" in run("verify")
    Path(entry["path"]).write_bytes(b"broken")
    assert f"{count - 1} of {count} in order" in run("verify", code=1)


def test_bundled_tuners_are_published_with_their_measurements() -> None:
    cards = list(Path(pertnn_zoo.__file__).parent.rglob("card.md"))
    assert cards and not [card for card in cards if "Not recorded." in card.read_text()]


def test_what_a_file_says_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    make_tuner("tiny", recipe={"note": "[red]hot[/red] [/] [link=x]"}).save(tmp_path / "t.safetensors")
    assert "[red]hot[/red] [/] [link=x]" in run("show", tmp_path / "t.safetensors")


def test_an_empty_zoo_says_what_to_do(tmp_path: Path) -> None:
    if not zoo.tuners():  # until a tuner is bundled
        assert "metazo meta-train" in run("list")
    with pytest.raises(UserError, match="is not a folder"):
        run("list", "--zoo", tmp_path / "none")
