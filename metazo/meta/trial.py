"""What is known of a tuner's file before the tuner is trained: no training may be lost to a file that its reader refuses."""

from __future__ import annotations

from metazo.errors import UserError
from metazo.io.plain import is_name, shown
from metazo.tuner.envelope import TunerFile
from metazo.tuner.limits import MAX_BYTES

_SPARE = 2**16  # bytes of a header for figures that are known at the end alone


def check_name(model: str) -> None:
    """Raises UserError for the name of a base model that a tuner's file cannot hold."""
    if not is_name(model):
        raise UserError(
            f"`model` {shown(model)} has {len(model)} characters, and a tuner names its base model in at most 512 that can be "
            "shown; rename the folder, or name a link to it."
        )


def check_file(smallest: TunerFile, name: str, value: int, least: int, each: int) -> None:
    """Raises UserError if a tuner's file would be refused by its reader.

    Args: smallest: a tuner of the same metadata for which the setting `name` is `least`; value: the setting; each: bytes of the
    file that 1 more of the setting takes.
    """
    data = smallest.to_bytes()
    smallest.from_bytes(data, f"the {smallest.called} that this run would write")
    taken = len(data) + _SPARE
    most = least + (MAX_BYTES - taken) // each
    if value > most:
        raise UserError(
            f"`{name}` is {value}, which makes a file of up to {taken + (value - least) * each:,} bytes, and a "
            f"{smallest.called} may have {MAX_BYTES:,}; choose at most {most:,} for this model."
        )
