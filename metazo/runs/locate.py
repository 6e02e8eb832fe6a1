"""Find the folder of a run, its settings, and the files that these name, from any working directory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from metazo.errors import UserError
from metazo.io.files import is_file, read_capped
from metazo.io.plain import parse_json
from metazo.models.embedded import EMBEDDED
from metazo.runs.config import FinetuneConfig
from metazo.settings import Unset
from metazo.steplog.format import STEPS

CONFIG, MODEL, SUMMARY = "config.json", "model", "summary.json"
STARTED = "started_in"  # key of the working directory in config.json: relative paths of the settings start there
UNSET = "unset"  # key of the names of the settings in config.json that nobody set (`Unset`)
PATHS = ("model", "task", "data", "tuner", "zoo", "objective")  # settings that may be paths
MAX_CONFIG_BYTES = 2**20


def run_of(path: Path) -> Path | None:
    """The folder of the run to which a path (the folder itself, or its kept model) belongs; None if there is no run."""
    for folder in (path, path.parent if path.name == MODEL else path):
        if is_file(folder / CONFIG) and is_file(folder / STEPS):
            return folder
    return None


def log_to_continue(config: FinetuneConfig) -> Path | None:
    """The step log of the run that goes on, if one does."""
    log = config.out / STEPS if config.resume and config.out is not None else None
    return log if log is not None and log.exists() else None


def read_config(path: Path) -> dict[str, Any]:
    """The settings of the run in a folder. Raises UserError if the folder holds no run."""
    if not is_file(path / CONFIG):
        raise UserError(f"{path} holds no run (no {CONFIG}).")
    try:
        found = parse_json(read_capped(path / CONFIG, MAX_CONFIG_BYTES, "settings of the run"))
    except ValueError as error:
        raise UserError(f"{path / CONFIG} is damaged, so the run cannot continue: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path / CONFIG} is damaged, so the run cannot continue: it is not a mapping of settings.")
    return found


def unset_in(found: Mapping[str, Any]) -> dict[str, Unset]:
    """The settings in a config.json that nobody set (`Unset`). A file of an earlier version does not name them: there a number
    that equals such a default counted as the default.
    """
    defaults = {item.name: item.default for item in fields(FinetuneConfig) if isinstance(item.default, Unset)}
    named = found.get(UNSET)
    if not isinstance(named, list):
        named = [name for name, default in defaults.items() if found.get(name) == default]
    return {name: default for name, default in defaults.items() if name in named and found.get(name) == default}


def located(settings: Mapping[str, Any], run: Path, names: Iterable[str] = PATHS) -> dict[str, Any]:
    """Settings of the run in a folder whose relative paths can be used from any working directory.

    A path is looked up from the directory in which the run was started, then from the same directory if it was moved
    together with the run. If it is in neither, the setting stays as it is: a name, or a path from here.
    """
    found = dict(settings)
    config = read_config(run)
    for name in names:
        value = settings.get(name)
        if not isinstance(value, str | Path) or str(value) in EMBEDDED or Path(value).is_absolute():
            continue
        for start in _starts(config, run):
            with suppress(OSError, ValueError):  # a name that no file can have
                if start != Path.cwd() and str(value) and (start / value).exists():
                    found[name] = type(value)(start / value)
                    break
    return found


def _starts(config: Mapping[str, Any], run: Path) -> list[Path]:
    """The directory that the relative paths of a run start in: the recorded one, and where it is now by the run's `out`."""
    started, out = config.get(STARTED), Path(str(config.get("out")))
    if not isinstance(started, str) or not Path(started).is_absolute():
        return []
    moved = run.absolute().parents[len(out.parts) - 1 :][:1] if not out.is_absolute() and ".." not in out.parts else ()
    return [Path(started), *moved]


def from_anywhere(config: FinetuneConfig) -> FinetuneConfig:
    """A run that is resumed from another working directory finds its model, task and tuner (`located`), and the sizes that
    nobody set when it began are those that nobody set. Its folder, which a stranger may have sent, never leads to the code of
    an objective."""
    if not config.resume or config.out is None:
        return config
    settings = asdict(config)
    settings |= {name: int(value) for name, value in settings.items() if isinstance(value, Unset)}
    settings |= unset_in(read_config(config.out))
    return replace(config, **located(settings, config.out, ("model", "task", "tuner")))


def as_begun(config: FinetuneConfig) -> FinetuneConfig:
    """A resumed run whose objective is the same function of a file of the same name, which may be elsewhere now, has it by the
    name with which it began; whether it is the same file is decided by the hash in the step log."""
    name = config.objective
    if not config.resume or config.out is None or name is None or ":" not in name:
        return config
    began = read_config(config.out).get("objective")
    same = isinstance(began, str) and re.split(r"[/\\]", began)[-1] == re.split(r"[/\\]", name)[-1]
    return replace(config, objective=began) if same else config
