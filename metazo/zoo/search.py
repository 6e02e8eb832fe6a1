"""Look tuners up in zoo folders, and check that the folders hold what their indexes say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from metazo.errors import UserError
from metazo.files import read_capped
from metazo.fit import fingerprint
from metazo.tuner import MAX_BYTES, Tuner
from metazo.zoo.index import TUNER_FILE, Entry, Found, folders, read_index


def tuners(zoo: str | Path | None = None) -> list[Found]:
    """Every tuner in the zoo folders, in the order they are searched."""
    return [Found(entry, folder, where) for where, folder in folders(zoo) for entry in read_index(folder)]


def named(name: str, zoo: str | Path | None = None) -> Found | None:
    """The tuner called `name`: `<base model>/<version>`, or the last published for that base model."""
    found = tuners(zoo)
    exact = [tuner for tuner in found if tuner.entry.name == name]
    bases = [tuner for tuner in found if name in (tuner.entry.name.rpartition("/")[0], tuner.entry.base_model)]
    if exact or not bases:
        return exact[0] if exact else None
    return [tuner for tuner in bases if tuner.folder == bases[0].folder][-1]


def find(
    named_shapes: Sequence[tuple[str, Sequence[int]]] | None = None,
    base_model: str | None = None,
    zoo: str | Path | None = None,
) -> list[Found]:
    """Tuners for a model, the best reason first: same fingerprint, same names where a tuner knows no shapes, same name
    of the base model. So a tuner of a base model is found for its derivatives, whatever they are called.
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


def checked(data: bytes, entry: Entry, origin: str) -> Tuner:
    """The tuner in `data`, after checking size, sha256, format, fingerprint and block count against the index."""
    if len(data) != entry.size:
        raise UserError(f"{origin} has {len(data):,} bytes and the zoo index says {entry.size:,}; it is refused")
    found = sha256(data).hexdigest()
    if found != entry.sha256:
        raise UserError(f"{origin} has sha256 {found} and the zoo index says {entry.sha256}; it is refused")
    tuner = Tuner.from_bytes(data, origin)
    if (tuner.info.fingerprint, len(tuner.info.blocks)) != (entry.fingerprint, entry.blocks):
        raise UserError(f"{origin} has another fingerprint or number of blocks than the zoo index says; it is refused")
    return tuner


@dataclass(frozen=True)
class Check:
    """Outcome of `verify` for one tuner: `problem` is None if it is in order."""

    name: str
    where: str
    folder: Path
    problem: str | None


def verify(zoo: str | Path | None = None) -> list[Check]:
    """Read and hash every tuner of the zoo folders again; also report tuner files that no index lists."""
    checks = []
    for where, folder in folders(zoo):
        entries = read_index(folder)
        for entry in entries:
            checks.append(Check(entry.name, where, folder, _problem(Found(entry, folder, where))))
        listed = {folder / entry.name / TUNER_FILE for entry in entries}
        for path in sorted(folder.rglob(TUNER_FILE)) if folder.is_dir() else []:
            if path not in listed:
                name = path.parent.relative_to(folder).as_posix()
                checks.append(Check(name, where, folder, "is not in index.json"))
    return checks


def _problem(tuner: Found) -> str | None:
    if tuner.entry.url is not None and not tuner.path.exists():
        return None  # held elsewhere: checked when it is pulled
    try:
        checked(read_capped(tuner.path, MAX_BYTES, "tuner"), tuner.entry, str(tuner.path))
    except UserError as error:
        return str(error)
    return None
