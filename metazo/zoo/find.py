"""Look tuners up in zoo folders, and check the folders against their indexes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from metazo.errors import UserError
from metazo.feedback.tuner import FeedbackTuner, is_feedback
from metazo.io.files import read_capped
from metazo.tuner.file import Tuner
from metazo.tuner.limits import MAX_BYTES, TUNER
from metazo.tuner.match import fingerprint
from metazo.zoo.index import Entry, Found, Item, folders, read_index
from metazo.zoo.log import Log


def entries(zoo: str | Path | None = None, key: str | None = None) -> list[Found]:
    """All entries of the zoo folders, in search order.

    key: a public key; if given, only the first folder (`zoo`, or the user's own) is read, and the key must have signed its
    index.
    """
    searched = folders(zoo)[:1] if key is not None else folders(zoo)
    return [Found(entry, folder, where) for where, folder in searched for entry in read_index(folder, key)]


def tuners(zoo: str | Path | None = None, kind: str = "tuner") -> list[Found]:
    """Every tuner of a kind, "tuner" or "feedback", in the zoo folders, in search order."""
    return [found for found in entries(zoo) if found.entry.kind == kind]


def named(name: str, zoo: str | Path | None = None, key: str | None = None, kind: str = "tuner") -> Found | None:
    """The entry called `name` (`<base model>/<version>`), or the last of this kind published for that base model, or the last
    of any other kind if there is none. `key` as for `entries`.
    """
    found = entries(zoo, key)
    exact = [tuner for tuner in found if tuner.entry.name == name]
    bases = [tuner for tuner in found if name in (tuner.entry.name.rpartition("/")[0], tuner.entry.base_model)]
    bases = [tuner for tuner in bases if tuner.entry.kind == kind] or bases
    if exact or not bases:
        return exact[0] if exact else None
    return [tuner for tuner in bases if tuner.folder == bases[0].folder][-1]


def find(
    named_shapes: Sequence[tuple[str, Sequence[int]]] | None = None,
    base_model: str | None = None,
    zoo: str | Path | None = None,
) -> list[Found]:
    """Tuners for a model, best match first: same fingerprint; same names, if a tuner knows no shapes; same name of the base
    model. A tuner of a base model is therefore found for the models derived from it, whatever their names.
    """
    wanted = None if named_shapes is None else fingerprint(named_shapes)
    groups: dict[str, list[Found]] = {"fingerprint": [], "names": [], "base model": []}
    for tuner in tuners(zoo):
        if wanted is not None and tuner.entry.fingerprint == wanted:
            why = "fingerprint"
        elif named_shapes is not None and tuner.entry.fingerprint is None and _fits(tuner, named_shapes):
            why = "names"
        elif base_model is not None and tuner.entry.base_model == base_model:
            why = "base model"
        else:
            continue
        groups[why].append(replace(tuner, why=why))
    return [tuner for group in groups.values() for tuner in group]


def _fits(tuner: Found, named_shapes: Sequence[tuple[str, Sequence[int]]]) -> bool:
    return tuner.path.is_file() and Tuner.load(tuner.path).fits(named_shapes).ok


def parsed(data: bytes, origin: str) -> Item:
    """The tuner, feedback tuner or log that these bytes are. Raises UserError for what is none of them."""
    if data.startswith(b'{"metazo_steps"'):
        return Log.from_bytes(data, origin)
    return FeedbackTuner.from_bytes(data, origin) if is_feedback(data) else Tuner.from_bytes(data, origin)


def checked(data: bytes, entry: Entry, origin: str) -> Item:
    """The tuner or log in `data`, whose size, sha256, format, fingerprint and block count are checked against the index."""
    if len(data) != entry.size:
        raise UserError(f"{origin} has {len(data):,} bytes and the zoo index says {entry.size:,}; it is refused")
    found = sha256(data).hexdigest()
    if found != entry.sha256:
        raise UserError(f"{origin} has sha256 {found} and the zoo index says {entry.sha256}; it is refused")
    if entry.kind == "log":
        log = Log.from_bytes(data, origin)
        if log.base_model != entry.base_model:
            raise UserError(f"{origin} is of another base model than the zoo index says; it is refused")
        return log
    tuner = {"tuner": Tuner, "feedback": FeedbackTuner}[entry.kind].from_bytes(data, origin)
    if (tuner.info.fingerprint, len(tuner.info.blocks)) != (entry.fingerprint, entry.blocks):
        raise UserError(f"{origin} has another fingerprint or number of blocks than the zoo index says; it is refused")
    return tuner


@dataclass(frozen=True)
class Check:
    """Outcome of `verify` for one tuner: `problem` is None if the tuner is in order."""

    name: str
    where: str
    folder: Path
    problem: str | None


def verify(zoo: str | Path | None = None, key: str | None = None) -> list[Check]:
    """Read and hash all files of the zoo folders again; also report tuner files that no index lists.

    `key` as for `entries`. Raises UserError if an index cannot be read or its signature does not match.
    """
    checks = []
    for where, folder in folders(zoo)[:1] if key is not None else folders(zoo):
        held = [Found(entry, folder, where) for entry in read_index(folder, key)]
        checks.extend(Check(found.entry.name, where, folder, _problem(found)) for found in held)
        listed = {found.path for found in held}
        for path in sorted(folder.rglob(TUNER)) if folder.is_dir() else []:
            if path not in listed:
                name = path.parent.relative_to(folder).as_posix()
                checks.append(Check(name, where, folder, "is not in index.json"))
    return checks


def _problem(tuner: Found) -> str | None:
    if tuner.entry.url is not None and not tuner.path.exists():
        return None  # the file is elsewhere and is checked when it is pulled
    try:
        checked(read_capped(tuner.path, MAX_BYTES, "tuner"), tuner.entry, str(tuner.path))
    except UserError as error:
        return str(error)
    return None
