"""Get a tuner or log from a path, a name in a zoo, an https address, or a Hub repository.

Downloaded data are checked completely, in memory, before any byte is written, so an interrupted or refused pull leaves
nothing behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from metazo.errors import UserError
from metazo.feedback.tuner import FeedbackTuner
from metazo.io.files import expanded, read_capped, safe_name
from metazo.io.redact import shown_address
from metazo.io.terminal import print_line
from metazo.tuner.file import Tuner
from metazo.tuner.limits import MAX_BYTES, TUNER
from metazo.zoo.download import download
from metazo.zoo.find import REPOSITORY, checked, named, parsed, tuners
from metazo.zoo.index import Entry, Found, Item, add, cache_folder, read_index
from metazo.zoo.log import Log

Report = Callable[[str], None]


def load(source: str | Path, zoo: str | Path | None = None, report: Report = print_line) -> Tuner:
    """The tuner that `source` names, checked; `report` is called for downloads. Raises UserError.

    `source` is tried in this order: a tuner file or a folder with one; a name in the zoo folders (`pico`, `pico/v1`; the cache
    is not searched for a base model called `org/name`); an https address, optionally ending in `#sha256=...`; a Hub
    repository `org/name`, `org/name@revision`, also with `#sha256=...`. A repository with a name like that of a tuner,
    `org/v1`, is read as `hub:org/v1` alone: the name of a tuner that is in no zoo must not become somebody's repository.
    """
    item = _fetch(str(source), zoo, report, None, called="tuner")[1]
    if isinstance(item, FeedbackTuner):
        raise UserError(
            f"`tuner` {shown_address(str(source))} is feedback, which goes with `optimizer='feedback'` alone."
        )
    if isinstance(item, Log):
        raise UserError(_A_LOG.format(shown_address(str(source))))
    return item


def load_feedback(source: str | Path, zoo: str | Path | None = None, report: Report = print_line) -> FeedbackTuner:
    """The feedback tuner that `source` names, as for `load`; the name of a base model is that of its last one."""
    item = _fetch(str(source), zoo, report, None, "feedback", "tuner")[1]
    if isinstance(item, Log):
        raise UserError(_A_LOG.format(shown_address(str(source))))
    if not isinstance(item, FeedbackTuner):
        raise UserError(
            f"`tuner` {shown_address(str(source))} is a tuner of block scales, which goes with methods that perturb weights; "
            "fit feedback with metazo meta-train --learn feedback."
        )
    return item


_A_LOG = "`tuner` {} is a model's step log, not a tuner; see metazo replay"


def read(source: str | Path, zoo: str | Path | None = None, report: Report = print_line) -> Item:
    """As `load`, but also reads feedback tuners, and a model published as its step log."""
    return _fetch(str(source), zoo, report, None)[1]


def opened(found: Found, report: Report = print_line) -> Item:
    """The tuner or log of an entry, as `find` gives it, checked against its index. Raises UserError."""
    data, entry = _from_zoo(found, report)
    return checked(data, entry, f"{entry.kind} {entry.name}")


def pull(
    source: str | Path, zoo: str | Path | None = None, report: Report = print_line, key: str | None = None
) -> Found:
    """`read`, and keep a copy in the cache, in which a tuner is found by its model's fingerprint later.

    key: a public key; if given, `source` must be a name in a zoo folder (`zoo`, or the user's own) whose index it signed.
    """
    data, item, entry = _fetch(str(source), zoo, report, key)
    base = item.base_model if isinstance(item, Log) else item.info.base_model
    version, licence = sha256(data).hexdigest()[:16], entry.licence if entry else None
    return add(item, data, cache_folder(), zoo_base(base), version, licence)


def zoo_base(base_model: str) -> str:
    """The zoo's folder for tuners of this base model: its name, or the last name if it is a path. The models that runs of
    metazo save all lie in a folder called `model`, so that of these it is the name of the run's folder."""
    try:
        if not Path(base_model).exists():
            return safe_name(base_model, "base model")
    except (UserError, OSError):
        pass
    names = [re.sub(r"[^A-Za-z0-9._+-]+", "-", part).strip(".-_+")[:90] for part in re.split(r"[/\\]", base_model)]
    *runs, last = [name for name in names if name] or ["model"]
    return safe_name(runs[-1] if runs and last == "model" else last, "base model")


def _fetch(
    source: str,
    zoo: str | Path | None,
    report: Report,
    key: str | None,
    kind: str = "tuner",
    called: str = "source",
) -> tuple[bytes, Item, Entry | None]:
    """The bytes that `source` names, what they are, and their index entry if they have one. called: the caller's argument."""
    address, _, wanted = source.partition("#sha256=")
    wanted = wanted.lower()
    if wanted and not re.fullmatch("[0-9a-f]{64}", wanted):
        raise UserError(f"`{called}` {shown_address(source)}: sha256 is not 64 hexadecimal digits")
    if key is not None:
        signed = named(address, zoo, key)
        if signed is None:
            raise UserError(f"{shown_address(address)!r} is not a name in the index that `key` signed; see `zoo`")
        data, entry = _from_zoo(signed, report)
    else:
        data, entry = (_cached(wanted) if wanted else None), None
        if data is None:
            data, entry = _read(address, zoo, report, kind, called)
    found = sha256(data).hexdigest()
    if wanted and found != wanted:
        raise UserError(f"{shown_address(address)} has sha256 {found} and not the {wanted} asked for; it is refused")
    if entry is not None:
        return data, checked(data, entry, f"{entry.kind} {entry.name}"), entry
    return data, parsed(data, shown_address(address)), None


def _read(source: str, zoo: str | Path | None, report: Report, kind: str, called: str) -> tuple[bytes, Entry | None]:
    """The bytes of a tuner or log, and its index entry if it has one."""
    if re.match(r"https?://", source):
        return download(source, report=report), None
    path = expanded(source)
    if _exists(path):
        return _local(path, report, called)
    tuner = named(source, zoo, kind=kind)
    if tuner is not None:
        return _from_zoo(tuner, report)
    repository, _, revision = source.removeprefix("hub:").partition("@")
    versioned = re.fullmatch(r"[^/:]+/(feedback-)?v\d+", source)
    if REPOSITORY.fullmatch(repository) and ".." not in source and not versioned:
        from metazo.tuner.hub import hub_file

        return read_capped(hub_file(repository, revision or None, report), MAX_BYTES, "tuner"), None
    known = ", ".join(sorted({found.entry.name for found in tuners(zoo, kind)})) or "none yet"
    if versioned:
        raise UserError(
            f"`{called}` {source!r} is in no zoo folder (which hold: {known}): give the folder as `zoo`. A Hub repository of "
            f"this name is hub:{source}"
        )
    raise UserError(
        f"`{called}` {shown_address(source)[:200]!r} is not a file, a folder, an https address, a Hub repository "
        f"org/name, or a name in the zoos (which hold: {known})"
    )


def _local(path: Path, report: Report, called: str) -> tuple[bytes, Entry | None]:
    """A tuner file, a folder with tuner.safetensors, or a zoo folder that holds one tuner."""
    if not path.is_dir():
        return read_capped(path, MAX_BYTES, "tuner"), None
    if (path / TUNER).exists():
        return read_capped(path / TUNER, MAX_BYTES, "tuner"), None
    entries = read_index(path)
    if len(entries) == 1:
        return _from_zoo(Found(entries[0], path, "zoo"), report)
    names = ", ".join(entry.name for entry in entries)
    hint = f"it is a zoo of {names}: name one and pass `zoo` {path}" if names else f"it has no {TUNER}"
    raise UserError(f"`{called}` {path} is a folder that holds no single tuner; {hint}")


def _from_zoo(tuner: Found, report: Report) -> tuple[bytes, Entry]:
    """The file of a zoo folder, or from the address in its index."""
    entry = tuner.entry
    if entry.url is None or tuner.path.exists():
        return tuner.read(), entry
    return _cached(entry.sha256) or download(entry.url, entry.size, report), entry


def _cached(digest: str) -> bytes | None:
    """The bytes with this sha256 from the cache, if it holds them undamaged."""
    for entry in read_index(cache_folder()):
        path = Found(entry, cache_folder(), "cache").path
        if entry.sha256 == digest and path.is_file():
            data = read_capped(path, MAX_BYTES, "cached tuner")
            if sha256(data).hexdigest() == digest:
                return data
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
