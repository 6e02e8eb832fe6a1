"""The operating systems that metazo runs on."""

from __future__ import annotations

import os

from metazo.errors import UserError

WINDOWS = os.name == "nt"


def refuse_windows() -> None:
    """Raises UserError on Windows. Nobody tests metazo there, where the locks of folders, files that are replaced while they
    are open, signals and forked workers are other ones. An optimizer in a loop of one's own needs none of them.
    """
    if WINDOWS:
        raise UserError(
            "metazo's commands and whatever writes a folder run on Linux and macOS, and this is Windows: use WSL 2 "
            "(optimizers in a loop of your own are not refused)."
        )
