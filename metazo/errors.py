"""The one exception for bad input."""

from __future__ import annotations


class UserError(Exception):
    """Input that metazo cannot work with: a flag, a file, a field.

    The message is one sentence that names what was wrong, what was found and what to do. The command line prints it
    without a traceback and exits with code 2; library users may catch it. Faults of metazo itself raise other types.
    """
