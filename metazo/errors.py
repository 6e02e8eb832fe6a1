"""The one exception for bad input."""

from __future__ import annotations

LONGEST = 1000
"""Characters of a message."""


class UserError(Exception):
    """Input that metazo cannot work with: a flag, a file, a field.

    The message is one sentence that names what was wrong, what was found and what to do. The command line prints it
    without a traceback and exits with code 2; library users may catch it. Faults of metazo itself raise other types.
    Whatever a file put into it, the message is one line that a terminal shows as it is: line breaks become spaces,
    control characters are escaped, and the middle of what is longer than LONGEST is left out.
    """

    def __init__(self, message: object = "") -> None:
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(message).split()))
        super().__init__(text if len(text) <= LONGEST else f"{text[:700]} [...] {text[-200:]}")
