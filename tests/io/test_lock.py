"""One process at a time in a folder: within a process, after a kill, and with odd files instead of the lock."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from metazo.errors import UserError
from metazo.io.lock import NAME, FolderLock

# earlier versions, and among them 4.2.0, empty the file of a lock that they are refused
NAMED = tuple(map(int, filelock.__version__.split(".")[:3])) >= (4, 2, 11)
HOLD = "import sys, time; from pathlib import Path; from metazo.io.lock import FolderLock\n"
HOLD += "lock = FolderLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"


def named(process: int, more: str = "") -> str:
    """How a message names the holder of a lock."""
    return f"process {process}{more}" if NAMED else "another process"


def test_a_second_holder_is_refused_by_process_and_host(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    words = f"`out` .* is in use by {named(process.pid, f' on {socket.gethostname()}')}; wait"
    for refused in (FolderLock(tmp_path / "a").acquire, FolderLock(tmp_path / "a").check):
        with pytest.raises(UserError, match=words):
            refused()
    process.kill()  # no one cleans up
    process.communicate()
    assert (tmp_path / "a" / NAME).exists()
    FolderLock(tmp_path / "a").check()
    with FolderLock(tmp_path / "a"), pytest.raises(UserError, match=named(os.getpid())):
        FolderLock(tmp_path / "a").acquire()
    assert not (tmp_path / "a" / NAME).exists() and (tmp_path / "a").is_dir(), "a folder that was there stays"


def test_a_check_waits_for_another_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check holds the lock for a moment, if a killed process left its file."""
    (tmp_path / NAME).write_text('{"pid": 1, "host": "gone"}')
    other = filelock.FileLock(tmp_path / NAME).acquire().lock
    monkeypatch.setattr("time.sleep", lambda seconds: other.release())
    FolderLock(tmp_path).check()


def test_a_folder_that_the_lock_made_goes_if_it_is_empty(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "empty"):
        pass
    with FolderLock(tmp_path / "full"):
        (tmp_path / "full" / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("content", ["", "no JSON", "[1]", '{"pid": "x"}', '{"pid": 1, "host": "\\u001b[2J"}'])
def test_whatever_the_lock_says_the_message_is_one_line(tmp_path: Path, content: str) -> None:
    with FolderLock(tmp_path):
        (tmp_path / NAME).write_text(content)
        with pytest.raises(UserError, match="in use by ") as error:
            FolderLock(tmp_path).acquire()
    assert str(error.value).isprintable()


def test_a_folder_with_a_lock_alone_is_empty(tmp_path: Path) -> None:
    FolderLock(tmp_path / "absent").check_empty()
    with FolderLock(tmp_path) as lock:
        lock.check_empty()
        (tmp_path / "file").touch()
        for path in (tmp_path, tmp_path / "file"):
            with pytest.raises(UserError, match=f"`out` {path} is not an empty folder; choose another"):
                FolderLock(path).check_empty()


def test_a_folder_that_is_replaced_is_no_longer_held_and_its_new_lock_stays(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run")
    first.check_held()  # it holds none
    first.acquire().check_held()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="run was removed, moved or replaced while"):
        first.check_held()
    second.acquire()
    with pytest.raises(UserError, match="run was removed, moved or replaced while"):
        first.check_held()
    first.release()
    second.check_held()
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_a_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(UserError, match="cannot be used"):
            FolderLock(path).acquire()
