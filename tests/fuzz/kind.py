"""A kind of file that metazo reads, and how cases of it are made."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

from hypothesis import strategies as st


@dataclass
class Kind:
    """One reader under test."""

    file: str
    """Path of a case in the folder of the test."""
    seeds: list[bytes]
    """Valid files, which are mutated."""
    documents: st.SearchStrategy[bytes]
    """Well-formed files with odd values."""
    read: Callable[[Path], object]
    """Reads the case in the folder, and checks the result."""
    by_hand: Callable[[], dict[str, bytes]] = dict
    """Makes bombs and other files, by name, which takes seconds; each must be refused."""
    around: dict[str, bytes] = field(default_factory=dict)
    """Other files in the folder."""
    share: int = 100
    """Number of documents per run of the suite; byte mutations are one and a half times as many."""
    growth: int = 256
    """MiB by which the address space may grow after the process begins to read hostile files."""

    @cached_property
    def hostile(self) -> dict[str, bytes]:
        return self.by_hand()

    def set_up(self, folder: Path) -> None:
        for name, content in self.around.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / self.file).parent.mkdir(parents=True, exist_ok=True)

    def case(self, folder: Path, content: bytes) -> Callable[[Path], object]:
        """Put a case into the folder; returns its reader."""
        path = folder / self.file
        path.unlink(missing_ok=True)  # some file systems flush a file that is emptied and written again
        path.write_bytes(content)
        return self.read


def to_json(tree: Any) -> bytes:
    """JSON in which lone surrogates are bytes, not escapes, half of the time: both reach a reader."""
    text = json.dumps(tree, ensure_ascii=len(str(tree)) % 2 == 0)
    return text.encode("utf-8", "surrogatepass")


def nested(opening: bytes, closing: bytes, depth: int) -> bytes:
    return opening * depth + closing * depth


def zeros(mebibytes: int) -> bytes:
    """An xz file of so many zeros (at most 65,535 MiB), of one block whose chunks repeat; lzma takes 10 s for each GiB."""
    chunk = lzma.compress(bytes(2**20), lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}])[:-1]
    flags, block = b"\0\0", _sealed(b"\2\0\x21\1\x16" + bytes(3))  # no checksum; LZMA2 with a dictionary of 8 MiB
    content = chunk * mebibytes + b"\0"
    index = b"\0\1" + _number(len(block) + len(content)) + _number(mebibytes * 2**20)
    index = _sealed(index + bytes(-len(index) % 4))
    footer = (len(index) // 4 - 1).to_bytes(4, "little") + flags
    whole = b"\xfd7zXZ\0" + flags + crc32(flags).to_bytes(4, "little") + block + content + bytes(-len(content) % 4)
    return whole + index + crc32(footer).to_bytes(4, "little") + footer + b"YZ"


def _sealed(part: bytes) -> bytes:
    return part + crc32(part).to_bytes(4, "little")


def _number(value: int) -> bytes:
    """Seven bits for each byte, the lowest first."""
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + _number(value // 128)
