"""Publish a tuner, or a model as its step log, into a zoo folder; a tuner can also go to the Hub."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from metazo.errors import UserError
from metazo.feedback.tuner import FeedbackTuner
from metazo.io.files import read_capped, safe_name
from metazo.io.plain import is_name, read_json, shown
from metazo.optimizers.registry import METHODS, load
from metazo.tuner.file import Tuner
from metazo.tuner.limits import MAX_BYTES
from metazo.zoo.find import parsed
from metazo.zoo.index import FILES, add, own_folder
from metazo.zoo.log import Log
from metazo.zoo.signature import Signer
from metazo.zoo.sources import zoo_base


def push(
    tuner: Tuner | FeedbackTuner | str | Path,
    to: str | Path | None = None,
    *,
    base: str | None = None,
    version: str | None = None,
    licence: str | None = None,
    sign: Signer | None = None,
) -> str:
    """Publish a tuner of either kind, a tuner file or a folder that holds one; returns its published name or address.

    to: a zoo folder, made if missing, by default the user's own (`METAZO_ZOO`); or `hub:org/name`.
    base: the name of the base model in the zoo; by default the name in the tuner, or if that is a local
    path, only its last name, or the one before `model`. version: by default the next of v1, v2, ... (feedback-v1, ...).
    licence: adds or replaces the tuner's licence.
    sign: signs the zoo's index (`metazo.zoo.signature.signer`).
    Raises UserError if the tuner is unfit, the name is taken by another tuner, or the zoo cannot be written.
    """
    _check_licence(licence)
    tuner = tuner if isinstance(tuner, Tuner | FeedbackTuner) else _read(Path(tuner))
    base = safe_name(base, "`name`") if base else zoo_base(tuner.info.base_model)
    info = replace(tuner.info, base_model=base, licence=licence or tuner.info.licence)
    published = replace(tuner, info=info)  # type: ignore[arg-type]
    data = published.to_bytes()
    item = parsed(data, "the tuner to be published")
    if not str(to or "").startswith("hub:"):
        return add(item, data, _folder(to), base, version, sign=sign).entry.name
    if version or sign:
        raise UserError("`version` and `sign` do not go with a Hub repository, which keeps its own revisions")
    return published.push_to_hub(str(to).removeprefix("hub:"))


def push_log(
    log: str | Path,
    to: str | Path | None = None,
    *,
    name: str | None = None,
    version: str | None = None,
    licence: str | None = None,
    sign: Signer | None = None,
) -> str:
    """Publish a fine-tuned model as the step log of its run; returns its name in the zoo folder `to`.

    The header is published as well, with paths reduced to their last name. name: by default base model and task.
    Raises UserError if the run is not finished, or if the log cannot be replayed.
    """
    if str(to or "").startswith("hub:"):
        raise UserError("a step log (`log`) goes into a zoo folder; to the Hub, upload the file by hand")
    _check_licence(licence)
    path = Path(log)
    read = Log.from_bytes(read_capped(path / FILES["log"] if path.is_dir() else path, MAX_BYTES, "step log"), str(log))
    if read.end is None:
        raise UserError(
            f"{log} has no last line, which names the weights that the run kept; resume the run to finish it."
        )
    if why := _not_replayable(read.header):
        raise UserError(f"{log} cannot be published, because its model cannot be rebuilt from it: {why}. "
                        "Publish the model itself.")  # fmt: skip
    base = zoo_base(read.base_model)
    read = read.published(base, _started_in(path if path.is_dir() else path.parent))
    task = re.sub(r"[^A-Za-z0-9._+-]+", "-", str(read.header.get("task", "model")))[:40]
    return add(
        read, read.data, _folder(to), safe_name(name or f"{base}-{task}", "`name`"), version, licence, sign
    ).entry.name


def _started_in(run: Path) -> Path | None:
    """The directory in which the run in a folder was started, as its settings say; None if they do not."""
    try:
        found = read_json(run / "config.json", "settings of the run")
    except UserError:
        return None
    start = found.get("started_in") if isinstance(found, dict) else None
    return Path(start) if isinstance(start, str) and Path(start).is_absolute() else None


def _not_replayable(header: dict[str, Any]) -> str | None:
    """Why `metazo replay` refuses a log, if the reason is in its header. A method of one's own is taken at its word."""
    load()
    method = METHODS.get(header["method"])
    if method is not None and not method.replayable:
        return f"the steps of {header['method']} do not follow from their record"
    settings = header.get("settings")
    if isinstance(settings, dict) and settings.get("head") == "prototype":
        return "its classification head was made from the training data (head prototype)"
    return None


def _check_licence(licence: str | None) -> None:
    if licence is not None and not (is_name(licence) and licence.strip()):
        raise UserError(
            f"`licence` is {shown(licence)}, not a line of text; give its name, such as 'Apache-2.0', or leave it out."
        )


def _read(path: Path) -> Tuner | FeedbackTuner:
    path = path / FILES["tuner"] if path.is_dir() else path
    found = parsed(read_capped(path, MAX_BYTES, "tuner"), str(path))
    if isinstance(found, Log):
        raise UserError(f"{path} is a step log; give it as `log`")
    return found


def _folder(to: str | Path | None) -> Path:
    return Path(to) if to else own_folder()
