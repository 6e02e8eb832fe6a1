"""Look tuners up in zoo folders, and check the folders against their indexes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from metazo.errors import UserError
from metazo.feedback.tuner import FeedbackTuner, is_feedback
from metazo.io.files import read_capped
from metazo.io.lock import FolderLock
from metazo.tuner.file import Tuner
from metazo.tuner.limits import MAX_BYTES, TUNER
from metazo.tuner.match import fingerprint
from metazo.zoo.card import card_of
from metazo.zoo.index import CARD, INDEX, PATIENCE, Entry, Found, Item, folders, read_index
from metazo.zoo.log import Log
from metazo.zoo.signature import INDEX_BYTES, NEW, SUFFIX

REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
"""The form of a Hub repository's name."""


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

    A pulled file says itself which its base model is, so that the cache is not asked for a base model that may be another's
    Hub repository, `org/name`.
    """
    found = entries(zoo, key)
    exact = [tuner for tuner in found if tuner.entry.name == name]
    bases = [tuner for tuner in found if name in (tuner.entry.name.rpartition("/")[0], tuner.entry.base_model)]
    bases = [tuner for tuner in bases if tuner.where != "cache" or not REPOSITORY.fullmatch(name)]
    bases = [tuner for tuner in bases if tuner.entry.kind == kind] or bases
    if exact or not bases:
        return exact[0] if exact else None
    return latest([tuner for tuner in bases if tuner.folder == bases[0].folder])


def latest(found: Sequence[Found]) -> Found:
    """The one published last, or of those that are numbered as it is, such as v2 and v10, the one of the highest number."""

    def version(tuner: Found) -> tuple[str, int]:
        start, number = re.fullmatch(r"(.*?)(\d{0,9})", tuner.entry.name).groups()  # type: ignore[union-attr]
        return start, int(number or 0)

    return max((tuner for tuner in found if version(tuner)[0] == version(found[-1])[0]), key=version)


def find(
    named_shapes: Sequence[tuple[str, Sequence[int]]] | None = None,
    base_model: str | None = None,
    zoo: str | Path | None = None,
) -> list[Found]:
    """Tuners for a model, best match first: same fingerprint; same names, if a tuner knows no shapes; same name of the base
    model. A tuner of a base model is therefore found for the models derived from it, whatever their names. The names are in
    the tuner's file; a file that is damaged matches none, and `verify` reports it.
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
    try:
        return tuner.path.is_file() and Tuner.load(tuner.path).fits(named_shapes).ok
    except UserError:  # a damaged tuner, perhaps of another model, must not hide those that fit
        return False


def parsed(data: bytes, origin: str) -> Item:
    """The tuner, feedback tuner or log that these bytes are. Raises UserError for what is none of them."""
    if data.startswith(b'{"metazo_steps"'):
        return Log.from_bytes(data, origin)
    return FeedbackTuner.from_bytes(data, origin) if is_feedback(data) else Tuner.from_bytes(data, origin)


def checked(data: bytes, entry: Entry, origin: str) -> Item:
    """The tuner or log in `data`; everything that the index says of it is checked, except a log's licence."""
    if len(data) != entry.size:
        raise UserError(f"{origin} has {len(data):,} bytes and the zoo index says {entry.size:,}; it is refused")
    found = sha256(data).hexdigest()
    if found != entry.sha256:
        raise UserError(f"{origin} has sha256 {found} and the zoo index says {entry.sha256}; it is refused")
    if entry.kind == "log":
        log = Log.from_bytes(data, origin)
        if log.base_model != entry.base_model:
            raise UserError(f"{origin} is of another base model than the zoo index says; it is refused")
        if (entry.fingerprint, entry.blocks) != (None, 0):
            raise UserError(f"{origin} is a log, of which the zoo index names blocks; it is refused")
        return log
    tuner = {"tuner": Tuner, "feedback": FeedbackTuner}[entry.kind].from_bytes(data, origin)
    if (tuner.info.fingerprint, len(tuner.info.blocks)) != (entry.fingerprint, entry.blocks):
        raise UserError(f"{origin} has another fingerprint or number of blocks than the zoo index says; it is refused")
    for name in ("base_model", "licence"):
        said, listed = getattr(tuner.info, name), getattr(entry, name)
        if said != listed:
            raise UserError(f"{origin} says {name} {said!r} and the zoo index says {listed!r}; it is refused")
    return tuner


@dataclass(frozen=True)
class Check:
    """Outcome of `verify` for one tuner or file."""

    name: str
    where: str
    folder: Path
    problem: str | None
    """What is wrong; None if nothing was found."""
    note: str | None = None
    """What was not checked."""
    seen: bool = True
    """Whether the file was read: not if it is elsewhere, or nothing that metazo reads."""


def verify(zoo: str | Path | None = None, key: str | None = None) -> list[Check]:
    """Read and hash all files of the zoo folders again; also report files that no index lists.

    A card that is not the one that this metazo writes for its file has a note, because another version may have written it.
    Files directly in a zoo folder, such as a README, have a note, and those in folders below are a problem; hidden ones in the
    zoo folder, such as .git, are left out. `key` as for `entries`. Raises UserError if an index cannot be read, names a
    tuner twice, or has no signature that matches.
    """
    searched = folders(zoo)[:1] if key is not None else folders(zoo)
    return [check for where, folder in searched for check in _settled(folder, where, key)]


def _settled(folder: Path, where: str, key: str | None) -> list[Check]:
    """The checks of a folder. A push writes the file first, then the index, then its signature: what is wrong is looked at
    again after a push that has ended meanwhile."""
    while True:
        before, checks, refused = _index_of(folder), [], None
        try:
            held = [Found(entry, folder, where) for entry in read_index(folder, key)]
            checks = [*map(_check, held), *_unlisted(folder, where, held)]
        except UserError as error:
            refused = error
        if refused is not None or any(check.problem for check in checks):
            FolderLock(folder, "zoo", PATIENCE).check()
            if _index_of(folder) != before:
                continue
        if refused is not None:
            raise refused
        return checks


def _index_of(folder: Path) -> list[bytes | None]:
    """The index of a folder and its signature, as they are."""
    paths = folder / INDEX, folder / f"{INDEX}{SUFFIX}"
    return [read_capped(path, INDEX_BYTES, "zoo index") if path.is_file() else None for path in paths]


def _check(tuner: Found) -> Check:
    about = (tuner.entry.name, tuner.where, tuner.folder)
    if tuner.entry.url is not None and not tuner.path.exists():
        return Check(*about, None, "not here, not checked", seen=False)
    try:
        item = checked(tuner.read(), tuner.entry, str(tuner.path))
    except UserError as error:
        return Check(*about, str(error))
    return Check(*about, None, _about_card(tuner, item))


def _about_card(tuner: Found, item: Item) -> str | None:
    card = card_of(item, tuner.entry.name, tuner.entry.sha256, tuner.entry.licence)
    try:
        there = read_capped(tuner.path.with_name(CARD), MAX_BYTES, "card")
    except UserError:
        return f"in order; {CARD} is missing or cannot be read"
    if there == card.encode():
        return None
    return f"in order; {CARD} is not what this metazo writes for it: another version wrote it, or it was changed"


def _unlisted(folder: Path, where: str, held: Sequence[Found]) -> Iterator[Check]:
    """The files of a zoo folder that its index does not list; those of the Python package of the bundled zoo are left out."""
    listed = {found.path for found in held} | {found.path.with_name(CARD) for found in held}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        inside = path.relative_to(folder)
        above, name = len(inside.parts) == 1, inside.as_posix()
        if path in listed or path.is_dir() or inside.parts[0].startswith(".") or re.fullmatch(r"\..*\.tmp", path.name):
            continue
        if name == f"{INDEX}{NEW}":
            yield Check(
                name,
                where,
                folder,
                f"is left of a push that was cut off; remove it if `metazo zoo verify --key KEY` finds {INDEX} in order, which "
                "else says what to do",
            )
        elif name in (INDEX, f"{INDEX}{SUFFIX}") or (where == "bundled" and (above or "__pycache__" in inside.parts)):
            continue
        elif above and path.name != TUNER:
            yield Check(name, where, folder, None, f"not in {INDEX}, not checked", seen=False)
        else:
            called = inside.parent.as_posix() if path.name == TUNER else name
            yield Check(called, where, folder, f"is not in {INDEX}")
