"""Files appear completely or not at all, also on a full disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from metazo.errors import UserError
from metazo.io.files import expanded, read_capped, whole_file, write_whole
from metazo.runs.measure import evaluate


def test_written_whole_over_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two" and len(list(path.parent.iterdir())) == 1


def test_interrupted_writing_keeps_the_older_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_no_room_for_the_file(tmp_path: Path) -> None:
    """The system refuses the write after 4 kB, as a full disk or a quota does."""
    program = (
        "import resource, signal, sys; from pathlib import Path; from metazo.io.files import write_whole\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "write_whole(Path(sys.argv[1]), bytes(10_000))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "file")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "file cannot be written (File too large); nothing was left there" in done.stderr
    assert not list(tmp_path.iterdir())


def test_read_is_capped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(11))
    assert read_capped(tmp_path / "file", 11, "test") == bytes(11)
    with pytest.raises(UserError, match="larger than the 10 bytes"):
        read_capped(tmp_path / "file", 10, "test")
    for path in (tmp_path, tmp_path / "none", Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(UserError):
            read_capped(path, 10, "test")


def test_a_path_of_an_unknown_user_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell hands ~nosuch/model on as it is, and so it is a path that does not exist."""
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/model") == Path("/home/me/model") and expanded("~nosuch/model") == Path("~nosuch/model")
    with pytest.raises(UserError, match="'~nosuch/model'"):
        evaluate("~nosuch/model", "pico_sentiment")
