"""The step log: an append-only record of steps, from which a run is resumed, replayed, checked and plotted.

The format is JSON with one object per line:

    {"metazo_steps":1,"model":...,"weights":...,...,"crc":N}                                the header (identity.header)
    {"step":0,"seeds":[s],"losses":[L+,L-],"c":[c],"lr":[1e-06],"crc":N}                    one line a step, 0, 1, 2, ...
    {"kept":800,"weights":"<sha256 of the model that was kept>","crc":N}                    the last, of a complete run

The last line also has "mixed":true if the run continued in another environment than the one that its header names.

step, seeds (one per query), losses (in the order of the method's probes), c (coefficients, one per query; empty if a loss
was not finite and the step was skipped), lr (of each parameter group). Block scales and the method's own state are not
written, because a replay computes them from the weights and losses before. Numbers are written so that they read back to
the same bits; nan, inf and -inf are strings. crc is the CRC-32 of the line without it, started from the crc of the line
before, so that a changed, lost or moved line is detected, with its number. It detects accidents, not forgery.

A line is written before the step's update, and handed to the operating system every `flush_every` lines and synced to
the disk every `fsync_every`. A killed process loses the lines that were not handed over, and a machine that loses power
loses those that were not synced; they are computed again, to the same bits. Such an end may leave a torn tail: bytes
after the last complete line that are not a line. Opening the log drops them and nothing else: a bad line with further
lines after it is damage, and an error.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metazo.errors import UserError
from metazo.io.files import opened
from metazo.io.plain import parse_json
from metazo.step.estimators import MOST_QUERIES
from metazo.step.record import Step

STEPS = "steps.jsonl"  # the log in the folder of a run
VERSION = 1
MAX_LINE = 128 * MOST_QUERIES
"""Most bytes of a line. A query takes at most 96: a seed of 20 digits, two losses and a coefficient of 24 characters."""
MAX_NESTED = 1 << 20
"""Most bytes of a line that is not four lists of numbers, as a step is: others may take 30 times their bytes of memory."""


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def encode(step: Step) -> dict[str, Any]:
    numbers = {"losses": step.losses, "c": step.coefficients, "lr": step.lr}
    return {"step": step.step, "seeds": step.seeds} | {k: [_plain(v) for v in values] for k, values in numbers.items()}


def decode(record: dict[str, Any]) -> Step:
    """Raises ValueError, KeyError or TypeError if the value is not a record of a step."""
    if set(record) != {"step", "seeds", "losses", "c", "lr"}:
        raise ValueError("its fields are not those of a step")
    lists = [record[key] for key in ("seeds", "losses", "c", "lr")]
    if not all(isinstance(part, list) for part in lists):
        raise ValueError("its seeds, losses, c or lr are not a list")
    if max(map(len, lists)) > 2 * MOST_QUERIES:
        raise ValueError(f"it has more numbers than a step of {MOST_QUERIES:,} queries")
    step, *seeds = (_whole(value) for value in [record["step"], *lists[0]])
    losses, c, lr = (tuple(_number(value) for value in part) for part in lists[1:])
    return Step(step, tuple(seeds), losses, c, lr)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{str(value)[:40]!r} is not a step or seed")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) and value not in ("nan", "inf", "-inf"):
        raise ValueError(f"{str(value)[:40]!r} is not a number")
    return float(value)


def line(record: dict[str, Any], chain: int) -> tuple[bytes, int]:
    """A record as a line, and the checksum for the next line."""
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()[:-1]
    chain = zlib.crc32(body, chain)
    data = body + b',"crc":%d}\n' % chain
    if _too_long(data):
        raise UserError(
            f"A line of the step log would have {len(data):,} bytes, and at most {MAX_LINE:,} are read (of a header "
            f"{MAX_NESTED:,}): choose fewer queries per step, or shorter settings."
        )
    return data, chain


def _too_long(data: bytes) -> bool:
    return len(data) > MAX_LINE or (len(data) > MAX_NESTED and data.count(b"[") + data.count(b"{") > 5)


def unpacked(data: bytes, chain: int) -> tuple[dict[str, Any], int]:
    """The record of a line, and the checksum for the next line. Raises ValueError if the line is torn or was changed."""
    body, mark, tail = data.rpartition(b',"crc":')
    after = zlib.crc32(body, chain)
    if not mark or tail != b"%d}\n" % after:
        raise ValueError("its checksum does not follow from the lines before")
    if _too_long(data):
        raise ValueError(f"it has {len(data):,} bytes")
    return parse_json(body + b"}"), after


@dataclass
class Scan:
    """The content of a log, up to its first bad line."""

    path: Path
    header: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    end: dict[str, Any] | None = None
    """The last line of a complete run: kept (step), weights (hash), mixed (if it was resumed in another environment)."""
    size: int = 0
    """Bytes of the complete lines."""
    chain: int = 0
    torn: int = 0
    """Bytes of a torn tail."""
    damage: str | None = None
    """The fault of the first bad line, with its number."""

    def sound(self) -> Scan:
        """The content itself. Raises UserError if the log is damaged; a torn tail is not damage."""
        if self.damage:
            raise UserError(
                f"{self.path} is damaged: {self.damage}. The {len(self.steps)} steps before are intact; metazo log repair "
                "keeps them and puts the rest aside, and the run computes it again if it is resumed."
            )
        return self


def scan(path: Path, data: bytes | None = None) -> Scan:
    """Read and check a whole log; `data`, if given, is its content. Raises UserError if the log cannot be read or has no
    header.
    """
    try:
        with opened(path, "step log") if data is None else io.BytesIO(data) as file:
            first = file.readline(MAX_LINE)
            try:
                header, chain = unpacked(first, 0)
                if header.get("metazo_steps") != VERSION:
                    raise ValueError(f"it is of version {str(header.get('metazo_steps'))[:20]}, read here is {VERSION}")
            except (ValueError, AttributeError) as error:
                raise UserError(
                    f"{path} is not a step log of metazo: its first line is not a header ({error})."
                ) from error
            found = Scan(path, header, size=len(first), chain=chain)
            while data := file.readline(MAX_LINE):
                try:
                    _take(found, data)
                except (ValueError, KeyError, TypeError, OverflowError) as error:
                    if file.read(1):
                        found.damage = f"line {len(found.steps) + 2} is bad ({error}) and others follow it"
                    else:
                        found.torn = len(data)
                    break
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    return found


def _take(found: Scan, data: bytes) -> None:
    record, chain = unpacked(data, found.chain)
    if found.end is not None:
        raise ValueError("it comes after the end of the run")
    if "kept" in record:
        _whole(record["kept"])
        if set(record) - {"mixed"} != {"kept", "weights"} or not isinstance(record["weights"], str | None):
            raise ValueError("its fields are not those of the end of a run")
        if record["kept"] > len(found.steps):
            raise ValueError("it ends another run")
        found.end = record
    else:
        step = decode(record)
        if step.step != len(found.steps):
            raise ValueError(f"it holds step {step.step}, and step {len(found.steps)} is expected")
        found.steps.append(step)
    found.size, found.chain = found.size + len(data), chain


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) for each difference of two mappings; None means that the key is missing."""
    return [(key, a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)]


def change(old: dict[str, Any], new: dict[str, Any], *, both: bool = True) -> str | None:
    """The first difference of two flat tables in words; None if there is none.

    both: compare only keys that both have, because another version of a library may have added or dropped some. For
    values that are kept as a hash ("sha256:...") only the key is named.
    """
    for key, before, now in differences(old, new):
        if both and not (key in old and key in new):
            continue
        if "sha256:" in f"{before}{now}":
            return f"the {key} changed"
        return f"{key} was {before!r} and is {now!r} now"
    return None
