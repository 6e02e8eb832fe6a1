"""One process at a time in an output folder.

The lock is advisory and belongs to the operating system (flock, by the filelock package): it ends with the process that
holds it, so a killed process blocks nobody. The file `.lock` in the folder names the holder. On a file system without
flock the package uses the file's existence as the lock, and gives its own warning.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from metazo.errors import UserError
from metazo.io.system import refuse_windows

NAME = ".lock"
_PATIENCE = 0.3  # seconds: long enough for a holder to remove the file, or to write its name into it
_POLL = 0.01  # seconds between the tries of a check


class FolderLock:
    """The lock of a folder, which is made if it is missing; use as a context manager, or call `acquire` and `release`.

    Args: folder; setting: the argument that names it, for messages; patience: seconds to wait for another holder.
    Raises UserError on Windows, and if another process, or another call in this one, holds the lock: with a new filelock
    (4.2.11) the message names its id and host. A release removes the file, unless it is another's by now, and the folder too if
    the lock made it and it is still empty.
    """

    def __init__(self, folder: Path, setting: str = "out", patience: float = _PATIENCE):
        refuse_windows()
        self.folder, self.setting, self.patience, self.made = folder, setting, patience, False
        self._lock: FileLock | None = None
        self._file: os.stat_result | None = None

    def acquire(self) -> FolderLock:
        try:
            self.made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / NAME, timeout=self.patience)
            lock.acquire()
            self._file = (self.folder / NAME).stat()
        except Timeout:
            raise self._refused() from None
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or error
            raise UserError(f"`{self.setting}` {self.folder} cannot be used ({problem}); choose another.") from error
        self._lock = lock
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        with suppress(OSError):  # a full disk: the lock is valid all the same
            (self.folder / NAME).write_text(json.dumps(holder), encoding="utf-8")
        return self

    def check(self) -> None:
        """Raise UserError if another process holds the lock; it is held here for a moment alone.

        Another check may hold it for such a moment too, so that this one has the same patience as `acquire`.
        """
        if self._lock is not None or not (self.folder / NAME).is_file():
            return
        with suppress(OSError):  # this process may only read the folder
            try:
                FileLock(self.folder / NAME, timeout=self.patience).acquire(poll_interval=_POLL).lock.release()
            except Timeout:
                raise self._refused() from None

    def check_held(self) -> None:
        """Raise UserError if this lock was acquired and its file is gone from the folder: another process could lock it too."""
        if self._lock is not None and not self._is_there():
            raise UserError(
                f"The folder {self.folder} was removed, moved or replaced while this process wrote into it, or its {NAME} was; "
                "nothing more is written there. Start again in a folder that stays until the end; if the files still exist, "
                "continue where they are with `resume=True`."
            )

    def _is_there(self) -> bool:
        """Whether the path still leads to the file that this lock locked."""
        try:
            return self._file is not None and os.path.samestat(self._file, (self.folder / NAME).stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a disk that fails: writing says so
            return True

    def check_empty(self) -> None:
        """Raise UserError if this is a file, or a folder that has anything but the lock."""
        if self.folder.exists() and (not self.folder.is_dir() or set(os.listdir(self.folder)) - {NAME}):
            raise UserError(f"`{self.setting}` {self.folder} is not an empty folder; choose another.")

    def release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is None:
            return
        with suppress(OSError):
            if self._is_there():
                (self.folder / NAME).unlink()
            if self.made:
                self.folder.rmdir()  # fails if something is in it
        lock.release()

    def __enter__(self) -> FolderLock:
        return self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _refused(self) -> UserError:
        holder = _holder(self.folder / NAME)
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        return UserError(
            f"`{self.setting}` {self.folder} is in use by {who}; wait until it ends, stop it, or choose another folder."
        )


def _holder(path: Path) -> dict[str, Any] | None:
    """The holder of the lock that the file names, if it names one."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(path.read_text(encoding="utf-8")[:1000])
        return {"pid": int(found["pid"]), "host": str(found["host"])[:100]}
    return None
