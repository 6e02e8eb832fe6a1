"""metrics.jsonl in the folder of a run: one JSON object per line. Its last key is crc, the CRC-32 of the values, started from
the crc of the line before.

A resumed run keeps the weights of the best evaluation in this file, so that a changed digit would change its result. The
checksum leaves out `seconds`, so that equal runs have equal lines except for the clock. Files of earlier versions have no
checksums; they are read as they are, and get them when the run is resumed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from metazo.io.plain import parse_json


def pack(records: Iterable[Mapping[str, Any]], chain: int = 0) -> tuple[bytes, int]:
    """Records as lines, and the checksum of the last. chain: the checksum of the line before."""
    lines = []
    for record in records:
        chain = _checksum(record, chain)
        lines.append(json.dumps({**record, "crc": chain}) + "\n")
    return "".join(lines).encode(), chain


def _checksum(record: Mapping[str, Any], chain: int) -> int:
    return zlib.crc32(json.dumps({key: value for key, value in record.items() if key != "seconds"}).encode(), chain)


def read(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The records up to the first line that is torn or damaged, without checksums, and the fault of the file in words; no
    records and no fault if there is no such file."""
    try:
        data = path.read_bytes()
    except OSError:
        return [], None
    found: list[dict[str, Any]] = []
    chain, checked = 0, True
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            return found, f"ends in {len(line)} bytes of a torn record, which are dropped"
        try:
            record = parse_json(line.decode())
            if not isinstance(record, dict):
                raise ValueError("it is not a table of names and values")
            given = record.pop("crc", None)
            if number == 1:
                checked = given is not None
            chain = _checksum(record, chain)
            if given != (chain if checked else None):
                raise ValueError("its checksum does not follow from the lines before")
        except ValueError as error:
            return found, f"is damaged at line {number} ({error}); its records from there on are made again"
        found.append(record)
    return found, None
