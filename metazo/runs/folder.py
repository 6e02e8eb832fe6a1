"""The output folder of a run, from which it is resumed: settings, metrics, snapshots, and the model at the end."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from metazo.errors import UserError
from metazo.io.files import read_capped, write_whole
from metazo.io.lines import LineFile
from metazo.io.lock import NAME as LOCK
from metazo.io.lock import FolderLock
from metazo.io.plain import MAX_JSON_BYTES, parse_json, shown
from metazo.io.tensorfile import read_tensors, write_tensors
from metazo.runs import metrics_file
from metazo.runs.locate import CONFIG, MODEL, STARTED, SUMMARY, UNSET, read_config
from metazo.runs.resources import used
from metazo.settings import Unset
from metazo.steplog.format import STEPS, change, scan

METRICS = "metrics.jsonl"
BEST = "best.safetensors"
SNAPSHOTS = "snapshot-*.safetensors"
BELONGS = "belongs"  # key of the hashes in config.json
_LEFT_BEHIND = ".*.tmp"  # files that a killed process was writing


def save_parts(folder: Path, *parts: Any) -> None:
    """Call `save_pretrained` of each object on a folder. Raises OSError if the disk is full or read-only.

    The libraries that write tensors and tokenizers are in Rust and report a full disk as an exception of their own.
    Files of safetensors 0.8 can be read by their owner alone (its issue 782); here by all who can read the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # peft's, of a base that is named as metazo's own models are
            warnings.filterwarnings("ignore", "Could not find a config file in ")
            for part in parts:
                part.save_pretrained(folder)
        for file in folder.rglob("*.safetensors"):
            file.chmod(folder.stat().st_mode & 0o666)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        text = str(error)
        if isinstance(error, SafetensorError) or "os error" in text:
            raise OSError(text) from error
        raise


class RunFolder:
    """The output folder of a run.

    Args: path; config: the run's settings, as JSON values; resume: continue the run in the folder; incidental: settings that
    may change on resuming; places: paths that may change to another, but not to none or from none, each with the name of its
    content in `belongs`, without which it may not change (None: the content is compared elsewhere); belongs: hashes of
    everything that the run's numbers depend on, by name, kept beside the settings and compared when the run is resumed; say:
    called with each sentence for the user; look: with resume, only check that the run can be resumed, and change nothing.
    One process at a time writes into the folder: it is locked from `begin` (or from here, if an unfinished run is
    resumed) to `close`; use it as a context manager.
    Raises UserError if the folder holds a run and resume is off, holds another run, or is in use; what writes or removes files
    raises it if the folder was removed or replaced meanwhile, so that two runs never mix in one.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        resume: bool = False,
        *,
        incidental: Iterable[str] = (),
        places: Mapping[str, str | None] | None = None,
        belongs: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
        look: bool = False,
    ):
        self.path, self.metrics, self.say = path, path / METRICS, say
        self.resume, self.lock, self.chain = resume, FolderLock(path), 0
        self.config: dict[str, Any] = json.loads(json.dumps(config, default=str))
        self.config[UNSET] = [name for name, value in config.items() if isinstance(value, Unset)]
        if belongs is not None:
            self.config[BELONGS] = json.loads(json.dumps(belongs, default=str))
        if path.exists() and not path.is_dir():
            raise UserError(f"`out` {path} is a file; name a folder.")
        if resume:
            self._compare(read_config(path), set(incidental), places or {})
            if look:
                self.lock.check()
                return
            if self.summary() is not None:
                self._tidy()
                return
            self.lock.acquire()
            self._clear(_LEFT_BEHIND)
            return
        self.lock.check()
        if (path / CONFIG).exists():
            raise UserError(f"`out` {path} already holds a run; choose another folder, or continue with `resume=True`.")
        elif path.is_dir() and any(not (entry.match(_LEFT_BEHIND) or entry.name == LOCK) for entry in path.iterdir()):
            raise UserError(f"`out` {path} is not empty and holds no run of metazo; choose an empty or new folder.")

    def begin(self) -> None:
        """Make the folder of a new run; nothing is written before. Does nothing for a run that is resumed."""
        if self.resume:
            return
        self.lock.acquire()
        if (self.path / CONFIG).exists():  # another process started here while this one loaded its model
            self.close()
            raise UserError(
                f"`out` {self.path} has a run that another process has just started; choose another folder."
            )
        self._clear(_LEFT_BEHIND)
        with suppress(OSError):  # a working directory that was removed
            self.config[STARTED] = os.getcwd()
        write_whole(self.path / CONFIG, json.dumps(self.config, indent=2).encode())

    def close(self) -> None:
        """Let other processes use the folder."""
        self.lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _compare(self, found: dict[str, Any], incidental: set[str], places: Mapping[str, str | None]) -> None:
        then, now = found.get(BELONGS), self.config.get(BELONGS)
        if now is not None and not isinstance(then, dict):
            self.say(
                f"The run in {self.path} was begun by an earlier version of metazo, which kept no hashes of weights, data and "
                "task; a change of them would not be noticed."
            )
        elif now is not None and isinstance(then, dict) and (what := change(then, now)) is not None:
            raise UserError(
                f"The run in {self.path} cannot continue: {what} since it began; put it back, or choose another `out`."
            )
        incidental = incidental | {BELONGS, STARTED, UNSET}
        for key in sorted({*found, *self.config} - incidental):
            old, new = found.get(key), self.config.get(key)
            moved = key in places and None not in (old, new) and places[key] in {None, *(then or ())}
            if old != new and not moved:
                raise UserError(
                    f"`{key}` was {shown(old)} when the run in {self.path} began and is "
                    f"{shown(new)} now; resume with the same settings."
                )

    def _clear(self, pattern: str) -> None:
        for path in self.path.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def used(self) -> int:
        """Size of the files in the folder, in bytes."""
        return used(self.path)

    # -- metrics ---------------------------------------------------------------------------------------------------

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, up to the first that is torn or damaged, which is reported with `say`."""
        found, fault = metrics_file.read(self.metrics)
        if fault:
            self.say(f"{METRICS} {fault}.")
        return found

    @staticmethod
    def read_records(path: Path) -> list[dict[str, Any]]:
        """The lines of the metrics.jsonl in a run's folder, up to the first that is torn or damaged."""
        return metrics_file.read(path / METRICS)[0]

    def keep_records(self, records: list[dict[str, Any]]) -> None:
        """Replace the metrics by these. A file that already holds them is left as it is."""
        self.lock.check_held()
        data, self.chain = metrics_file.pack(records)
        if not self.metrics.exists() or self.metrics.read_bytes() != data:
            write_whole(self.metrics, data)

    def record(self, **values: Any) -> None:
        """Append a line to those of `keep_records`, and sync it to the disk."""
        self.lock.check_held()
        data, chain = metrics_file.pack([values], self.chain)
        lines = LineFile(self.metrics)
        try:
            lines.append(data)
            self.chain = chain
            lines.sync()
        finally:
            lines.close()

    # -- tensors ---------------------------------------------------------------------------------------------------

    def save_tensors(self, name: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a step, completely or not at all."""
        self.lock.check_held()
        write_tensors(self.path / name, tensors, {"step": str(step)})

    def load_tensors(self, name: str) -> tuple[int, dict[str, Tensor]] | None:
        """Step and tensors; None if the file is damaged, which is reported with `say`."""
        with suppress(SafetensorError, OSError, ValueError, KeyError):
            tensors, metadata = read_tensors(self.path / name)
            return int(metadata["step"]), tensors
        self.say(f"{name} is damaged and is not used.")
        return None

    def step_of(self, name: str) -> int | None:
        """The step of saved tensors, from the file's header alone; None if there is no such file, or it is no tensor file."""
        with (
            suppress(SafetensorError, OSError, ValueError, KeyError, TypeError),
            safe_open(self.path / name, "pt") as file,
        ):
            return int(file.metadata()["step"])
        return None

    def remove(self, *patterns: str) -> None:
        """Remove files that match, before others take their place."""
        self.lock.check_held()
        for pattern in patterns:
            self._clear(pattern)

    def save_snapshot(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a snapshot, completely or not at all, and remove older ones."""
        self.save_tensors(f"snapshot-{step:08d}.safetensors", step, tensors)
        for old in self.snapshots()[1:]:
            old.unlink(missing_ok=True)

    def snapshots(self) -> list[Path]:
        """Snapshots, the newest first."""
        return sorted(self.path.glob(SNAPSHOTS), reverse=True)

    def load_snapshot(self, at_most: int) -> tuple[int, dict[str, Tensor]] | None:
        """The newest undamaged snapshot that is not past step `at_most`."""
        for path in self.snapshots():
            found = self.load_tensors(path.name)
            if found is not None and found[0] <= at_most:
                return found
        return None

    # -- the end ---------------------------------------------------------------------------------------------------

    def save_model(self, *parts: Any) -> None:
        """Write `model/` by save_pretrained of each object, completely or not at all."""
        self.lock.check_held()
        target, temporary = self.path / MODEL, self.path / f".model.{os.getpid()}.tmp"
        try:
            save_parts(temporary, *parts)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except OSError as error:
            problem = error.strerror or error
            raise UserError(
                f"{target} cannot be written ({problem}); put that right and continue with `resume=True`."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def summary(self) -> dict[str, Any] | None:
        """The result of a complete run; None if there is none, if it has not the form of one, or if the log has lost its end,
        which is then computed again. Raises UserError if the log is damaged.
        """
        found = None
        with suppress(UserError, ValueError):
            found = parse_json(read_capped(self.path / SUMMARY, MAX_JSON_BYTES, "summary"))
        return found if _is_summary(found) and self._log_is_whole() else None

    def _log_is_whole(self) -> bool:
        if not (self.path / STEPS).exists():  # meta-training has none, and that of a run may be kept elsewhere
            return True
        found = scan(self.path / STEPS).sound()
        if found.end is None:
            self.say(f"The log of this complete run ends after step {len(found.steps)}: the rest is computed again.")
        return found.end is not None

    def complete(self, summary: dict[str, Any]) -> None:
        """Write the result, and remove the files that only a resumed run needs."""
        self.lock.check_held()
        write_whole(self.path / SUMMARY, json.dumps(summary, indent=2).encode())
        self._clear_unneeded()

    def _clear_unneeded(self) -> None:
        self.remove(SNAPSHOTS, BEST, _LEFT_BEHIND)

    def _tidy(self) -> None:
        """Remove files of a process that was killed after it wrote the summary, if the folder is writable and not in use."""
        with suppress(UserError, OSError):
            try:
                self.lock.acquire()
                self._clear_unneeded()
            finally:
                self.close()


def _is_summary(found: Any) -> bool:
    """Whether a JSON value has the fields of a summary that are shown, each of its type."""
    if not isinstance(found, dict):
        return False
    scores = [found.get(name) for name in ("before", "dev", "test")]
    numbers = [found.get(name) for name in ("forwards", "kept_step", "seconds")]
    for part in scores:
        if not isinstance(part, dict):
            return False
        numbers += part.values()
    return all(isinstance(found.get(name, 0), str | None) for name in ("task", "optimizer")) and all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in numbers
    )
