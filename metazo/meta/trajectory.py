"""A teacher's path on disk: the weights at chosen steps, the batches, the losses and the optimizer's settings.

manifest.json            the identity of the path, its length, and the steps whose weights are stored
log.jsonl                one line per step: task, examples, loss, learning rate
step00000000.safetensors the weights before that step
teacher00000000.safetensors  momentum or moments at the last of them, so that recording can be resumed
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.io.files import write_whole
from metazo.io.lock import NAME as LOCK
from metazo.io.lock import FolderLock
from metazo.io.plain import finite, parse_json
from metazo.io.tensorfile import check_tensors, read_tensors, write_tensors
from metazo.meta.gradient import Loss
from metazo.meta.order import MetaTask, Order
from metazo.meta.path import load_weights, weights_of
from metazo.meta.reset import put
from metazo.meta.teacher import Teacher
from metazo.runs.resources import require_space, used
from metazo.steplog.format import change
from metazo.tuner.match import fingerprint

FORMAT_VERSION = 1
ORIGIN = "origin"  # key of the hashes in the manifest; recordings of earlier versions lack it
_MANIFEST, _LOG = "manifest.json", "log.jsonl"


def snapshot_name(step: int) -> str:
    return f"step{step:08d}.safetensors"


def _teacher_name(step: int) -> str:
    return f"teacher{step:08d}.safetensors"


def disk_use(tensors: Sequence[NamedTensor], teacher: str, steps: int, every: int) -> int:
    """Bytes of a recording: a snapshot every `every` steps, and two copies of the teacher's state while it is replaced."""
    weights = sum(tensor.param.numel() * tensor.param.itemsize for tensor in tensors)
    moments = {"sgd": 1, "adamw": 2}[teacher]
    return weights * (-(-steps // every) + 2 * moments) + 400 * steps


def belongs_to(
    model: str,
    tasks: Sequence[MetaTask],
    tensors: Sequence[NamedTensor],
    settings: dict[str, Any],
    origin: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The facts that a path and a run must share; `origin`: hashes of weights, data and tasks (`runs.inputs.belongs`)."""
    shapes = fingerprint((tensor.name, tuple(tensor.param.shape)) for tensor in tensors)
    sizes = {task.name: len(task) for task in tasks}
    found = {"format_version": FORMAT_VERSION, "model": model, "fingerprint": shapes, "tasks": sizes, **settings}
    return found | ({ORIGIN: origin} if origin is not None else {})


def record(
    folder: Path,
    model: nn.Module,
    tensors: Sequence[NamedTensor],
    tasks: Sequence[MetaTask],
    teacher: Teacher,
    order: Order,
    identity: dict[str, Any],
    *,
    steps: int,
    every: int,
    report=None,
) -> None:
    """Run the teacher for `steps` steps from the model's weights and record its path, or continue such a recording.

    report: called with (step, loss) after each step. The weights are left at the end of the path. Raises UserError
    before the first step if the folder holds something else or a damaged recording, or if the disk is too small.
    """
    manifest_path = folder / _MANIFEST
    manifest: dict[str, Any] = {**identity, "steps": steps, "every": every, "snapshots": [], "complete": False}
    if manifest_path.exists():
        present = _read_manifest(folder)
        _compare(present, manifest | {"snapshots": present["snapshots"], "complete": present["complete"]}, folder)
        manifest = present
    elif folder.exists() and any(not entry.match(".*.tmp") and entry.name != LOCK for entry in folder.iterdir()):
        raise UserError(f"`record` {folder} holds something else than a recording; choose an empty folder.")
    if manifest["complete"]:
        return
    require_space(folder, disk_use(tensors, teacher.kind, steps, every) - used(folder), "Recording the teacher")
    folder.mkdir(parents=True, exist_ok=True)
    for left_behind in folder.glob(".*.tmp"):
        left_behind.unlink()
    write_whole(manifest_path, json.dumps(manifest, indent=1).encode())
    first = 0
    lines: list[str] = []
    if manifest["snapshots"]:
        first = manifest["snapshots"][-1]
        _check_weights(folder, [first])
        put(tensors, folder / snapshot_name(first), "theta/")
        try:
            teacher.load(read_tensors(folder / _teacher_name(first))[0])
        except (SafetensorError, OSError) as error:
            raise _damaged(folder, f"{_teacher_name(first)} cannot be read ({error})") from error
        lines = [json.dumps(row) for row in _read_log(folder, manifest, first)]
        _drop_earlier(folder, manifest["snapshots"])
    write_whole(folder / _LOG, "".join(line + "\n" for line in lines).encode())
    with (folder / _LOG).open("a", encoding="utf-8") as log:
        for step in range(first, steps):
            if step % every == 0 and step not in manifest["snapshots"]:
                log.flush()
                os.fsync(log.fileno())
                write_tensors(folder / snapshot_name(step), weights_of(tensors))
                write_tensors(folder / _teacher_name(step), teacher.state())
                manifest["snapshots"].append(step)
                write_whole(manifest_path, json.dumps(manifest, indent=1).encode())
                _drop_earlier(folder, manifest["snapshots"])
            number, indices = order.batch(step)
            rate = teacher.rate()
            loss = teacher.step(lambda task=tasks[number], chosen=indices: task.loss(model, chosen))
            if step == 0 and loss != loss:
                raise UserError("The teacher's loss is not finite at the first step: lower `teacher_lr`.")
            row = {"step": step, "task": tasks[number].name, "examples": indices, "loss": finite(loss), "lr": rate}
            log.write(json.dumps(row) + "\n")
            if report is not None:
                report(step, loss)
    manifest["complete"] = True
    write_whole(manifest_path, json.dumps(manifest, indent=1).encode())


def _drop_earlier(folder: Path, snapshots: Sequence[int]) -> None:
    """Remove all but the last of the teacher's states."""
    for step in snapshots[:-1]:
        (folder / _teacher_name(step)).unlink(missing_ok=True)


@dataclass
class Trajectory:
    """A complete recording."""

    folder: Path
    manifest: dict[str, Any]
    log: list[dict[str, Any]]

    @classmethod
    def open(
        cls,
        folder: Path,
        identity: dict[str, Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Trajectory:
        """Open a recording, and read all of it once to see that it is as it was written.

        Raises UserError if it is missing, incomplete, damaged, or of another identity.
        """
        manifest = _read_manifest(folder)
        if identity is not None:
            _compare(manifest, identity, folder)
            if ORIGIN in identity and ORIGIN not in manifest:
                say(
                    f"The recording in {folder} is of an earlier version of metazo, which kept no hashes of weights, data and "
                    "task; a change of them would not be noticed."
                )
        FolderLock(folder, "trajectory").check()
        if not manifest["complete"]:
            raise UserError(f"The recording in {folder} is not complete; continue with `record` {folder}.")
        log = _read_log(folder, manifest, manifest["steps"])
        _check_weights(folder, manifest["snapshots"])
        return cls(folder, manifest, log)


class Recorded:
    """The weights along a recording, which repeats: at each step the latest snapshot, and the step's own batch."""

    def __init__(self, trajectory: Trajectory, tensors: Sequence[NamedTensor], tasks: Sequence[MetaTask]):
        self.trajectory, self.tensors = trajectory, tensors
        self.number = {task.name: number for number, task in enumerate(tasks)}
        self.lies: int | None = None

    def begin(self, step: int) -> bool:
        place = step % len(self.trajectory.log)
        snapshot = max(s for s in self.trajectory.manifest["snapshots"] if s <= place)
        if snapshot != self.lies:
            put(self.tensors, self.trajectory.folder / snapshot_name(snapshot), "theta/")
            self.lies = snapshot
            return True
        return False

    def restarts(self, step: int) -> bool:
        return step > 0 and step % len(self.trajectory.log) == 0

    def batch(self, step: int) -> tuple[int, list[int]]:
        row = self.trajectory.log[step % len(self.trajectory.log)]
        return self.number[row["task"]], row["examples"]

    def advance(self, loss: Loss) -> float | None:
        return None

    def state(self) -> dict[str, Tensor]:
        lies = -1 if self.lies is None else self.lies
        return weights_of(self.tensors) | {"snapshot": torch.tensor(lies)}

    def load(self, state: dict[str, Tensor]) -> None:
        load_weights(self.tensors, state)
        self.lies = int(state["snapshot"])


def content_hash(folder: Path) -> str:
    """Hash of a complete recording's manifest and log, which tell it from every other. Raises UserError if there is none."""
    _read_manifest(folder)
    try:
        content = b"".join((folder / name).read_bytes() for name in (_MANIFEST, _LOG))
    except OSError as error:
        raise _damaged(folder, f"{_LOG} cannot be read ({error})") from error
    return f"sha256:{sha256(content).hexdigest()}"


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = parse_json((folder / _MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no recording of a teacher ({_MANIFEST}: {error}).") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{folder / _MANIFEST} is not a recording that this version of metazo reads.")
    steps: Any = manifest.get("steps")
    kept, tasks = manifest.get("snapshots"), manifest.get("tasks")
    sound = (
        all(_is_count(number) for number in (steps, manifest.get("every")))
        and isinstance(manifest.get("complete"), bool)
        and isinstance(tasks, dict)
        and all(map(_is_count, tasks.values()))
        and isinstance(manifest.get(ORIGIN, {}), dict)
        and isinstance(kept, list)
        and all(type(step) is int and 0 <= step < steps for step in kept)
        and kept == sorted(set(kept))
        and (kept[:1] == [0] or not (kept or manifest["complete"]))
    )
    if not sound:
        raise _damaged(folder, f"{_MANIFEST} is not that of a recording")
    return manifest


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _read_log(folder: Path, manifest: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The first lines of the log; those of a complete recording are all. Raises UserError if one of them is not sound."""
    try:
        lines = (folder / _LOG).read_bytes().splitlines()
    except OSError as error:
        raise _damaged(folder, f"{_LOG} cannot be read ({error})") from error
    if len(lines) < count or (manifest["complete"] and len(lines) > count):
        raise _damaged(folder, f"{_LOG} has {len(lines)} lines and not {count}")
    rows = []
    for step, line in enumerate(lines[:count]):
        row = None
        with suppress(ValueError):
            row = parse_json(line)
        if not _is_row(row, step, manifest["tasks"]):
            raise _damaged(folder, f"line {step + 1} of {_LOG} is not a batch of that step")
        rows.append(row)
    return rows


def _is_row(row: Any, step: int, sizes: dict[str, int]) -> bool:
    """Whether this is a line of the log for this step: a batch of a task, of which the sizes are given by name."""
    if not isinstance(row, dict) or row.get("step") != step or row.get("task") not in list(sizes):
        return False
    examples = row.get("examples")
    return (
        isinstance(examples, list)
        and examples != []
        and all(type(example) is int and 0 <= example < sizes[row["task"]] for example in examples)
    )


def _check_weights(folder: Path, steps: Sequence[int]) -> None:
    """Raises UserError if the weights before one of these steps are not those that were recorded."""
    for step in steps:
        try:
            check_tensors(folder / snapshot_name(step))
        except (SafetensorError, OSError) as error:
            raise _damaged(folder, f"{snapshot_name(step)} cannot be read ({error})") from error


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"The recording in {folder} is damaged: {what}; remove the folder and record again.")


def _compare(present: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    for key, value in wanted.items():
        if key == ORIGIN:
            if (what := change(present.get(ORIGIN) or {}, value)) is not None:
                raise UserError(f"The recording in {folder} is of another run: {what} since it was made; record again.")
        elif key == "model" and present.get(ORIGIN) and wanted.get(ORIGIN):
            continue  # the hash of its weights decides, whatever it is called
        elif present.get(key) != value:
            raise UserError(
                f"The recording in {folder} is of another run: {key} is {present.get(key)!r} there and {value!r} here."
            )
