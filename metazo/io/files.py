"""Writes files completely or not at all, and checks file names that come from a stranger's file."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from metazo.errors import UserError

_SAFE_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,95}")
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(10))}

# Where a system has them: a pipe does not make the reader wait, and bytes are not taken for text (Windows).
_AS_IT_IS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` complete, at the end of the block, or not at all.

    It is written under a temporary name in the same folder (made if missing), flushed to the disk, renamed.
    If the block raises, the temporary file is removed. Raises UserError if the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name[:60]}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        problem = error.strerror or error
        raise UserError(f"{path} cannot be written ({problem}); nothing was left there") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` completely or not at all; raises UserError as `whole_file` does."""
    with whole_file(path) as file:
        file.write(data)


def replaceable(out: Path) -> Path:
    """The folder `out`, or the one that a link leads to. Raises UserError if another cannot take its place later."""
    try:
        out = Path(os.path.realpath(out))
    except OSError as error:  # the working directory was removed
        raise UserError(
            f"`out` {out} cannot be used ({error.strerror or error}); give a path from the root."
        ) from error
    if out.is_dir() and (os.path.samefile(out, os.curdir) or os.path.ismount(out)):
        what = f"`out` {out} is the working directory or a mount point, which the model's folder cannot replace"
        raise UserError(f"{what}; name a new folder, such as {out / 'model'}.")
    return out


def expanded(path: str | Path) -> Path:
    """The path with the home folder in place of a ~ at its start; unchanged if there is no such user, or no home folder."""
    return Path(os.path.expanduser(path))


def is_file(path: Path) -> bool:
    """Whether this is a regular file, and not a folder, a device or a pipe, or a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def require_files(folder: Path, *names: str) -> None:
    """Raises UserError if one of these files is not in the folder."""
    for name in names:
        if not is_file(folder / name):
            raise UserError(f"{folder / name} is not a file; give a folder that has it.")


def opened(path: Path, what: str) -> BinaryIO:
    """A regular file, open for reading. Raises UserError for anything else: a missing file, a folder, a pipe, a device.

    The file is opened without blocking, so that a pipe does not make it wait, and the open file is what is checked.
    """
    try:
        number = os.open(path, os.O_RDONLY | _AS_IT_IS)
    except FileNotFoundError as error:
        raise UserError(f"{what} {path} is not a file; check the path") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise UserError(f"{what} {path} is not a file; check the path")
    return os.fdopen(number, "rb")


def read_capped(path: Path, limit: int, what: str) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; raises UserError if it is missing or larger."""
    try:
        with opened(path, what) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror or error})") from error
    if len(data) > limit:
        raise UserError(f"{what} {path} is larger than the {limit:,} bytes allowed; is it the right file?")
    return data


def safe_name(name: str, what: str) -> str:
    """`name` itself if each of its parts between slashes is a harmless file name on every system, else raises UserError.

    Refused: empty parts, `..`, absolute paths, backslashes, drive letters, hidden names, device names (`NUL`,
    `COM1`), anything but ASCII letters, digits and `._+-`, and more than four parts.
    """
    parts = name.split("/")
    for part in parts:
        if not _SAFE_PART.fullmatch(part) or part.endswith(".") or part.split(".")[0].lower() in _DEVICES:
            raise UserError(f"{what} {name[:200]!r} is refused: {part[:100]!r} is not a harmless file name")
    if len(parts) > 4:
        raise UserError(f"{what} {name[:200]!r} is refused: it has more than four parts")
    return name
