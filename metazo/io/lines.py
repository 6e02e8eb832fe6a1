"""A file to which lines are appended. Each line is complete, except that the last may be torn if the process died."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from metazo.errors import UserError


class LineFile:
    """Append to a file without Python's buffers: after `append`, the operating system has the line.

    The line therefore survives the end of the process (kill -9); `sync` writes it to the disk, so that it survives a loss of
    power. The file is made if missing. Raises UserError if the file cannot be written; a line that does not fit on a full
    disk is removed again.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise self._problem(error) from error
        self.size = os.fstat(self.file).st_size

    def append(self, data: bytes) -> None:
        try:
            written = 0
            while written < len(data):
                written += os.write(self.file, data[written:])
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.file, self.size)
            raise self._problem(error) from error
        self.size += len(data)

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes."""
        os.ftruncate(self.file, size)
        self.size = size

    def sync(self) -> None:
        try:
            os.fsync(self.file)
        except OSError as error:
            raise self._problem(error) from error

    def close(self) -> None:
        os.close(self.file)

    def _problem(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path} cannot be written ({error.strerror}); its lines are intact: put that right and continue with "
            "`resume=True`."
        )
