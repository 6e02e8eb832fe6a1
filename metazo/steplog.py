"""The step log: an append-only record of steps, from which a run is resumed, replayed and plotted.

One JSON object a line. The first is the header (what the steps belong to), every other a `Step`; each carries the
checksum of the line before, so that a torn or changed line is found. Python writes floats so that they read back to the
same bits; losses that are not finite are written as the strings nan, inf, -inf.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from metazo.errors import UserError
from metazo.optimizers.step import Step

VERSION = 1


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def encode(step: Step) -> dict[str, Any]:
    """The record of a step; the scales are left out, they follow from what came before."""
    record = {"step": step.step, "seeds": step.seeds, "losses": step.losses, "c": step.coefficients, "lr": step.lr}
    return {key: _plain(value) for key, value in record.items()}


def decode(record: dict[str, Any]) -> Step:
    numbers = {key: tuple(float(value) for value in record[key]) for key in ("losses", "c", "lr")}
    seeds = tuple(int(seed) for seed in record["seeds"])
    return Step(int(record["step"]), seeds, numbers["losses"], numbers["c"], numbers["lr"])


def _line(record: dict[str, Any], chain: int) -> tuple[bytes, int]:
    body = json.dumps(record, separators=(",", ":"))
    chain = zlib.crc32(body.encode(), chain)
    return f'{body[:-1]},"crc":{chain}}}\n'.encode(), chain


def _checked(line: bytes, chain: int) -> tuple[dict[str, Any] | None, int]:
    """The record of a line, None where it is torn or was changed; and the checksum after it."""
    try:
        record = json.loads(line)
        found = record.pop("crc")
        body = json.dumps(record, separators=(",", ":"))
    except (ValueError, KeyError, AttributeError, TypeError):
        return None, chain
    expected = zlib.crc32(body.encode(), chain)
    return (record, expected) if line.endswith(b"\n") and found == expected else (None, chain)


class StepLog:
    """Append steps to a log; each reaches the operating system before `append` returns.

    Opening a log that exists checks it and drops what follows the last whole record. Raises UserError where there is no
    whole header, or the header is not `header`.
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        header = {"metazo_steps": VERSION, **header}
        self.path = path
        if path.exists():
            found, steps, size, self.chain = scan(path)
            if found != json.loads(json.dumps(header)):
                odd = next(key for key in {**found, **header} if found.get(key) != header.get(key))
                raise UserError(
                    f"{path.name} belongs to another run: its {odd} is {found.get(odd)!r}, now {header.get(odd)!r}; "
                    "choose another --out, or resume with the same settings."
                )
            self.steps = steps
            self.file: BinaryIO = path.open("r+b")
            self.file.truncate(size)
            self.file.seek(size)
        else:
            self.steps = []
            line, self.chain = _line(header, 0)
            self.file = path.open("x+b")
            self.file.write(line)
            self.file.flush()

    def append(self, step: Step) -> None:
        line, self.chain = _line(encode(step), self.chain)
        self.file.write(line)
        self.file.flush()

    def cut(self, count: int) -> None:
        """Keep the first `count` steps and drop the rest."""
        self.file.seek(0)
        line = self.file.readline()
        _, self.chain = _checked(line, 0)
        for _ in self.steps[:count]:
            line = self.file.readline()
            _, self.chain = _checked(line, self.chain)
        self.file.truncate(self.file.tell())
        self.steps = self.steps[:count]

    def close(self) -> None:
        self.file.close()


def scan(path: Path) -> tuple[dict[str, Any], list[Step], int, int]:
    """Header, steps, length in bytes of the whole part, and the checksum at its end."""
    try:
        with path.open("rb") as file:
            header, chain = _checked(file.readline(), 0)
            if header is None or header.get("metazo_steps") != VERSION:
                raise UserError(f"{path} is not a step log of metazo (its first line is not a whole header).")
            steps, size = [], file.tell()
            for line in file:
                record, chain_after = _checked(line, chain)
                if record is None:
                    break
                steps.append(decode(record))
                size, chain = size + len(line), chain_after
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a step log: {error}.") from error
    return header, steps, size, chain


def read(path: Path) -> Iterator[Step]:
    """The steps of a log, up to the first torn record."""
    yield from scan(path)[1]
