"""A kind of file that metazo reads, and how cases of it are made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


@dataclass
class Kind:
    """One reader under test."""

    file: str
    """Where a case is put, inside the folder of the test."""
    seeds: list[bytes]
    """Sound files, which are mutated."""
    documents: st.SearchStrategy[bytes]
    """Files that are well-formed and say odd things."""
    read: Callable[[Path], object]
    """Reads the case in the folder; checks what it was given."""
    hostile: dict[str, bytes] = field(default_factory=dict)
    """Bombs and other files made by hand, by name; each must be refused."""
    around: dict[str, bytes] = field(default_factory=dict)
    """Other files in the folder."""
    share: int = 100
    """Documents that the suite reads of it each time, and half as many byte mutations again."""
    growth: int = 256
    """MiB of address space that a process may take beyond what it had when it began to read hostile files."""

    def set_up(self, folder: Path) -> None:
        for name, content in self.around.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / self.file).parent.mkdir(parents=True, exist_ok=True)

    def case(self, folder: Path, content: bytes) -> Callable[[Path], object]:
        """Put a case into the folder; returns its reader."""
        (folder / self.file).write_bytes(content)
        return self.read


def to_json(tree: Any) -> bytes:
    """JSON in which lone surrogates are bytes, not escapes, half of the time: both reach a reader."""
    text = json.dumps(tree, ensure_ascii=len(str(tree)) % 2 == 0)
    return text.encode("utf-8", "surrogatepass")


def nested(opening: bytes, closing: bytes, depth: int) -> bytes:
    return opening * depth + closing * depth
