"""The one exception for bad input."""

from __future__ import annotations

import os
import re
import sys

LONGEST = 1000
"""Characters of a message."""
_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{16,}|(?<=://)[^/\s@]+(?=@)|(?<=[Bb]earer )\S+"
    r"|(?<=[?&])\w*(?:token|key|secret|password|signature)\w*=[^&\s#'\"]+"
)
"""Text that looks like a secret: a token of the Hub, user and password of an address, a header, a part of a query."""


class UserError(Exception):
    """Input that metazo cannot work with: a flag, a file, a field.

    The message is one sentence that names what was wrong, what was found and what to do. The command line prints it
    without a traceback and exits with code 2; library users may catch it. Faults of metazo itself raise other types.
    Whatever a file or a server put into it, the message is one line that a terminal shows as it is: line breaks become
    spaces, control characters are escaped, secrets are left out, and so is the middle of what is longer than LONGEST.

    Attributes, for a run of several processes: shared, whether every process raised it; of_rank, the rank of the one process
    that did, unless it is rank 0.
    """

    shared = False
    of_rank: int | None = None

    def __init__(self, message: object = "") -> None:
        text = without_secrets(" ".join(str(message).split()))
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        super().__init__(text if len(text) <= LONGEST else f"{text[:700]} [...] {text[-200:]}")


def first_sentence(error: BaseException) -> str:
    """Of the message of another library's error, for a message of metazo's own; the error's class if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")[:300]


def without_secrets(text: str) -> str:
    """The text with *** for the Hub's token of this user and for whatever looks like a secret."""
    tokens = {os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    hub = sys.modules.get("huggingface_hub")  # if it is not loaded, no code has read the stored token
    if hub is not None:
        tokens.add(hub.get_token() or "")
    for token in tokens:
        if len(token) >= 8:
            text = text.replace(token, "***")
    return _SECRET.sub("***", text)
