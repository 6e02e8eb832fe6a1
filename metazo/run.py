"""A run's folder, its order of data, and a polite end: what fine-tuning and meta-training share."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from metazo.errors import UserError
from metazo.files import whole_file, write_whole


class Interrupted(Exception):
    """A run was asked to stop and has saved what it needs to go on; the message says how."""


def batch_indices(step: int, batch_size: int, examples: int, seed: int) -> list[int]:
    """Examples of a step: a walk through a new permutation each epoch, a function of the step alone.

    So a resumed run reads what the first would have read. Returns: batch_size indices.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(examples) for epoch in {p // examples for p in places}
    }
    return [int(orders[place // examples][place % examples]) for place in places]


@contextmanager
def interruptible() -> Iterator[list[str]]:
    """Within, SIGINT and SIGTERM are put into the list that is given; a second one ends the process as usual.

    Look at the list after each step, save and go. Outside the main thread signals are left alone.
    """
    caught: list[str] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    before = {}
    with suppress(ValueError):  # not the main thread
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require_space(folder: Path, needed: int, what: str) -> None:
    """UserError where the disk of `folder` has less than `needed` bytes free."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{what} needs {size(needed)} on the disk of {folder} and {size(free)} are free; choose another place."
        )


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


class RunFolder:
    """The output folder of a run: config.json, metrics.jsonl, snapshots.

    Args: path; config: the settings that decide the result, as JSON values; resume: go on with the run that is there.
    Raises UserError where the folder holds a run and resume is off, or holds another run.
    """

    def __init__(self, path: Path, config: dict[str, Any], resume: bool = False):
        self.path, self.metrics = path, path / "metrics.jsonl"
        marker = path / "config.json"
        config = json.loads(json.dumps(config, default=str))
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path} is a file; name a folder.")
        if marker.exists():
            if not resume:
                raise UserError(f"--out {path} already holds a run; choose another folder, or go on with --resume.")
            try:
                found = json.loads(marker.read_text())
            except ValueError as error:
                raise UserError(f"{marker} is damaged, so the run cannot be resumed: {error}.") from error
            for key in sorted({*found, *config}):
                if found.get(key) != config.get(key):
                    raise UserError(
                        f"--{key.replace('_', '-')} was {found.get(key)!r} when the run in {path} began and is "
                        f"{config.get(key)!r} now; resume with the same settings."
                    )
        elif resume:
            raise UserError(f"--resume: {path} holds no run (no config.json).")
        elif path.is_dir() and any(path.iterdir()):
            raise UserError(f"--out {path} is not empty and holds no run of metazo; choose an empty or new folder.")
        else:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--out {path} cannot be made: {error.strerror}.") from error
            write_whole(marker, json.dumps(config, indent=2).encode())

    def records(self) -> list[dict[str, Any]]:
        return self.read_records(self.path)

    @staticmethod
    def read_records(path: Path) -> list[dict[str, Any]]:
        """What the metrics.jsonl of a run's folder holds; a torn last line is left out."""
        metrics, found = path / "metrics.jsonl", []
        if metrics.exists():
            for line in metrics.read_text().splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def keep_records(self, records: list[dict[str, Any]]) -> None:
        write_whole(self.metrics, "".join(json.dumps(record) + "\n" for record in records).encode())

    def record(self, **values: Any) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def save_snapshot(self, step: int, tensors: dict[str, Tensor], keep: int = 2) -> None:
        """Write a snapshot whole or not at all; the `keep` newest stay."""
        data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with whole_file(self.path / f"snapshot-{step:08d}.safetensors") as file:
            file.write(safetensors.torch.save(data, {"step": str(step)}))
        for old in self.snapshots()[keep:]:
            old.unlink(missing_ok=True)

    def snapshots(self) -> list[Path]:
        """Newest first."""
        return sorted(self.path.glob("snapshot-*.safetensors"), reverse=True)

    def load_snapshot(self, at_most: int) -> tuple[int, dict[str, Tensor]] | None:
        """The newest snapshot that can be read and is not past step `at_most`."""
        for path in self.snapshots():
            step = int(path.stem.removeprefix("snapshot-"))
            with suppress(SafetensorError, OSError, ValueError):
                if step <= at_most:
                    return step, safetensors.torch.load_file(path)
        return None


def peak_memory() -> int:
    """Bytes: the process's largest resident set, or the GPU's peak where one is in use."""
    import resource

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
