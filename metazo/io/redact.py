"""Removes possible secrets from addresses in messages, logs and settings."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_LOGIN = re.compile(r"[^/\s@:]+:[^/\s@]+(?=@)")


def shown_address(address: str) -> str:
    """An address without user, password, query and fragment, which may be secrets; other texts without user:password@."""
    if "://" not in address:
        return _LOGIN.sub("***", address)
    try:
        parts = urlsplit(address)
        return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
    except ValueError:
        return "the address"


def has_secret(address: str) -> bool:
    """Whether an address has a component that may be a secret: a user, a password, a query."""
    if "://" not in address:
        return False
    try:
        parts = urlsplit(address)
    except ValueError:
        return True
    return bool(parts.username or parts.password or parts.query)
