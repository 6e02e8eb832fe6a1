"""Pull, push and import onto a disk that is full or read-only: a real small file system. Existing files do not change."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from metazo import zoo
from metazo.errors import UserError
from metazo.tuner.file import BlockSpec, Tuner, TunerInfo
from metazo.tuner.networks import PertNN
from tests.zoo.test_cli import run
from tests.zoo.test_importer import networks, saved


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.strip()}")
    yield place
    gc.collect()  # errors keep files open
    subprocess.run(["umount", str(place)], check=True)


def wide(seed: int = 0, blocks: int = 50) -> Tuner:
    """A tuner of about 2 kB per block."""
    names = [f"w{n}" for n in range(blocks)]
    return Tuner(PertNN(blocks, seed=seed), TunerInfo("wide", [BlockSpec(name, [(name, (2, 2))]) for name in names]))


def state(folder: Path) -> dict[str, str]:
    """Every file but the locks, by its hash: temporary files would be among them."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in paths}


def attempts(disk: Path, outside: Path) -> dict[str, Callable[[], object]]:
    """Commands that write at least 100 kB into the zoo, the cache or a file on the disk."""
    wide(seed=9, blocks=120).save(outside / "t.safetensors")
    (outside / "t.pth").write_bytes(saved(networks(90)))
    return {
        "push": lambda: zoo.push(wide(seed=1, blocks=120), disk / "zoo"),
        "pull": lambda: zoo.pull(outside / "t.safetensors"),
        "import": lambda: run("import", outside / "t.pth", "--base-model", "a/b", "--out", disk / "new.safetensors"),
        "save": lambda: wide(blocks=120).save(disk / "zoo" / "wide" / "v1" / "tuner.safetensors"),
    }


@pytest.mark.parametrize("action", ["push", "pull", "import", "save"])
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_nothing_is_lost_and_nothing_is_left(
    kind: str, action: str, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(disk / "hf"))
    zoo.push(wide(blocks=20), disk / "zoo")
    wide(blocks=20).save(tmp_path / "small.safetensors")
    zoo.pull(tmp_path / "small.safetensors")
    act = attempts(disk, tmp_path)[action]
    if kind == "full":
        (disk / "filler").write_bytes(bytes(300_000))
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    before = state(disk)
    with pytest.raises(UserError, match="No space left|Read-only file system") as error:
        act()
    assert str(disk) in str(error.value)
    assert state(disk) == before
    assert {check.problem for check in zoo.verify(disk / "zoo")} == {None}
    if kind == "full":
        (disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    act()  # with enough space it succeeds
    assert {check.problem for check in zoo.verify(disk / "zoo") if check.name != "wide/v1"} <= {None}
