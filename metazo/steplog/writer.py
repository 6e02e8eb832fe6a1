"""Write a step log: append, sync, cut, finish."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metazo.errors import UserError
from metazo.io.files import write_whole
from metazo.io.lines import LineFile
from metazo.io.system import refuse_windows
from metazo.step.record import Step
from metazo.steplog.format import VERSION, Scan, change, differences, encode, line, scan

# this file is beside the log until the run is complete, if the run continued in another environment
ENVIRONMENTS = "environment.json"
LATER = ("architecture", "definition", "own", "optimizer")  # fields of the header that logs of earlier versions lack

ADDED = ("split", "trained", "head", "tokenizer", "tokenizing", "counting", "trust", "networks", "cost")
"""Keys that logs of older versions lack; if the data are the same, a missing key is not a difference."""


class StepLog:
    """Appends steps to a new or existing log.

    Args: path; header: identifies the run; flush_every, fsync_every: see metazo/steplog/format.py (fsync_every 0: at `sync`
    alone); say: called with a sentence for the user if a torn tail is dropped or versions have changed.
    Attributes: steps: those in the log; end: the last line of a complete run.
    Raises UserError on Windows, and if the log is damaged or belongs to another run. "environment" in the header may differ.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        *,
        flush_every: int = 1,
        fsync_every: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ):
        refuse_windows()
        header = {"metazo_steps": VERSION, **header}
        self.path, self.flush_every, self.fsync_every = path, flush_every, fsync_every
        if not path.exists():
            write_whole(path, line(header, 0)[0])
        found = scan(path).sound()
        wanted = json.loads(json.dumps(header))
        compare(found, wanted, say)
        self.others = path.with_name(ENVIRONMENTS)  # environments of steps, other than the header's
        if found.end is None and environment_changes(found.header.get("environment"), wanted.get("environment", {})):
            write_whole(self.others, json.dumps(wanted["environment"]).encode())
        self.steps, self.end, self.chain = found.steps, found.end, found.chain
        self.file = LineFile(path)
        if found.torn:
            say(
                f"{path.name} ends in {found.torn} bytes of a torn record, which are dropped; "
                f"{len(self.steps)} steps are intact."
            )
            self.file.cut(found.size)
        self.waiting = b""
        self.count = len(self.steps)

    def append(self, step: Step) -> None:
        data, self.chain = line(encode(step), self.chain)
        self.waiting += data
        self.count += 1
        if self.count % self.flush_every == 0:
            self.flush()
        if self.fsync_every and self.count % self.fsync_every == 0:
            self.sync()

    def flush(self) -> None:
        """Hand waiting lines to the operating system. If the disk is full, they are dropped and computed again later."""
        data, self.waiting = self.waiting, b""
        if data:
            self.file.append(data)

    def sync(self) -> None:
        self.flush()
        self.file.sync()

    def finish(self, kept: int, weights: str | None) -> None:
        """Write the last line: the step whose weights were kept, and their hash."""
        if self.end is None:
            self.end = {"kept": kept, "weights": weights} | ({"mixed": True} if self.others.exists() else {})
            data, self.chain = line(self.end, self.chain)
            self.waiting += data
        self.sync()
        self.others.unlink(missing_ok=True)

    def cut(self, count: int) -> None:
        """Keep the first `count` steps and drop the rest."""
        if count == len(self.steps) and self.end is None:
            return
        size = _size_of(self.path, count)
        self.file.cut(size)
        self.steps, self.end, self.count = self.steps[:count], None, count
        self.chain = scan(self.path).chain

    def close(self) -> None:
        self.flush()
        self.file.close()


def _size_of(path: Path, count: int) -> int:
    """Bytes of the header and the first `count` steps."""
    with path.open("rb") as file:
        return sum(len(file.readline()) for _ in range(count + 1))


def environment_changes(then: Any, now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, then, now) of each difference of two environments, as far as the earlier one was recorded."""
    return [change for change in differences(then, now) if change[0] in then] if isinstance(then, dict) else []


def report_environment(then: Any, now: dict[str, Any], say: Callable[[str], None]) -> None:
    """Say in what the environment of a run that goes on differs from that in which it began."""
    what = ", ".join(f"{name} {old} then and {new} now" for name, old, new in environment_changes(then, now))
    if what:
        say(f"The run began in another environment ({what}): later steps may differ in their last bits.")


def compare(found: Scan, wanted: dict[str, Any], say: Callable[[str], None]) -> None:
    """Raises UserError if a log is of another run than `wanted`, the header of a run that is resumed."""
    there = found.header
    for key in {**there, **wanted}:
        if there.get(key) == wanted.get(key):
            continue
        if key in LATER and key not in there:
            say(
                f"The log was begun by an earlier version of metazo and does not record the {key}, so a change of it would "
                "not be noticed."
            )
            continue
        if key in LATER:
            if (what := change(there[key], wanted[key])) is not None:
                raise UserError(
                    f"{found.path.name} belongs to another run: {what} ({key}); choose another `out`, or put it back."
                )
            continue
        if key == "environment":
            report_environment(there.get(key), wanted[key], say)
            continue
        if (key == "trained" or (key in ADDED and key not in there)) and there.get("data") == wanted.get("data"):
            continue  # the examples are the same; older logs lack the key, or record the sizes that were asked for
        if key == "data" and there.get("split", 1) != wanted.get("split", 1):
            raise UserError(
                f"{found.path.name} cannot be continued: its examples were drawn by version {there.get('split', 1)} of the "
                f"split into train, dev and test, and this metazo has version {wanted.get('split', 1)}; resume it with the "
                "metazo that began it, or start it again"
            )
        if key == "weights" and "cast" in wanted and "cast" not in there:
            raise UserError(
                f"{found.path.name} cannot be continued: it was begun by an earlier version of metazo, which left a part of "
                f"this bitsandbytes checkpoint, or its arithmetic, in {wanted['cast']} as it was saved; resume it with that "
                "version, or start it again"
            )
        if key == "cast":
            continue  # weights and settings say the same
        if key == "order" and key in wanted:
            raise UserError(
                f"{found.path.name} cannot be continued: its batches of similar length are in the order of version "
                f"{there.get(key, 1)}, and this metazo has version {wanted[key]}; resume it with the metazo that began "
                "it, or start it again"
            )
        if key == "unsaved" and key in wanted:
            raise UserError(
                f"{found.path.name} cannot be continued: it was begun by an earlier version of metazo, which trained weights "
                "of this model that transformers does not save; resume it with that version, or start it again"
            )
        if key == "decay" and key in wanted:
            raise UserError(
                f"{found.path.name} cannot be continued: it was begun by an earlier version of metazo, whose `weight_decay` "
                "was part of the momentum; resume it with that version, or start it again"
            )
        if key == "objective" and there.get(key) and wanted.get(key):  # hashes of its file
            raise UserError(
                f"{found.path.name} belongs to another run: the file of its `objective` has changed; put it back, or rebuild "
                "the weights so far with metazo replay and start a new run from them."
            )
        name, old, new = (key, there.get(key), wanted.get(key))
        if isinstance(old, dict) and isinstance(new, dict):
            changed = differences(old, new)
            if not changed:
                continue  # a setting that is newer than the log, and has its default None
            name, old, new = changed[0]
            name = f"tuner's {name}" if key == "networks" else name
        raise UserError(
            f"{found.path.name} belongs to another run: its {name} is {old!r}, now {new!r}; "
            "choose another `out`, or resume with the same settings."
        )
