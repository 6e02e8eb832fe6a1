"""Removes possible secrets from addresses in messages, logs and settings, and the folders of this machine from names."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

_LOGIN = re.compile(r"[^/\s@:]+:[^/\s@]+(?=@)")

_FILES = (".py", ".yaml", ".yml", ".safetensors")


def shown_address(address: str) -> str:
    """An address without user, password, query and fragment, which may be secrets; other texts without user:password@."""
    if "://" not in address:
        return _LOGIN.sub("***", address)
    try:
        parts = urlsplit(address)
        return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
    except ValueError:
        return "the address"


def shortened(name: str, start: Path | None = Path()) -> str:
    """A name without the folders of this machine: the last name of a path, and a Hub id as it is. start: where relative paths
    start, by which they are told from Hub ids; if None, the form of the name alone decides."""
    path, mark, function = name.rpartition(":") if ".py:" in name else (name, "", "")
    local = Path(path).is_absolute() or path.count("/") > 1 or path.startswith((".", "~")) or _is_path(path, start)
    return (Path(path).name if local else path) + mark + function


def _is_path(name: str, start: Path | None) -> bool:
    try:
        return Path(name.partition("#")[0]).suffix in _FILES or (start is not None and (start / name).exists())
    except (OSError, ValueError):  # a text that is too long for a name
        return False


def has_secret(address: str) -> bool:
    """Whether an address has a component that may be a secret: a user, a password, a query."""
    if "://" not in address:
        return False
    try:
        parts = urlsplit(address)
    except ValueError:
        return True
    return bool(parts.username or parts.password or parts.query)
