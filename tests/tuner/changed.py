"""Bytes of a tuner whose header was changed, as a stranger could."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def changed(data: bytes, edit: Callable[[dict[str, Any]], Any], where: str = "metadata") -> bytes:
    """The bytes with the header, or the metadata in it, changed by `edit`."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    content = json.loads(header["__metadata__"]["metazo"])
    edit(header if where == "header" else content)
    if where == "metadata":
        header["__metadata__"]["metazo"] = json.dumps(content)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]
