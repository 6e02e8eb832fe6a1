"""Zoo folders: an index.json and, for each tuner, `<base model>/<version>/{tuner.safetensors,card.md}`.

The versions of a base model's tuners are v1, v2, ..., those of its feedback tuners feedback-v1, feedback-v2, ...
A fine-tuned model published as its step log is stored as `<name>/<version>/{steps.jsonl,card.md}`. The cache, a user's
own zoo and the zoo that is installed with metazo all have this layout.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pertnn_zoo
from metazo.errors import UserError
from metazo.feedback.tuner import FeedbackTuner
from metazo.io.files import expanded, read_capped, safe_name, write_whole
from metazo.io.lock import FolderLock
from metazo.io.plain import parse_json
from metazo.steplog.format import STEPS
from metazo.tuner.file import Tuner
from metazo.tuner.limits import MAX_BYTES, TUNER
from metazo.zoo.card import card_of
from metazo.zoo.log import Log
from metazo.zoo.signature import INDEX_BYTES, NEW, SUFFIX, Signer, check_signature, signed

FORMAT_VERSION = 1
INDEX = "index.json"
PATIENCE = 60.0
"""Seconds that a push waits for another one into the same zoo."""
FILES = {"tuner": TUNER, "feedback": TUNER, "log": STEPS}
Item = Tuner | FeedbackTuner | Log
CARD = "card.md"
TAKEN = {INDEX, f"{INDEX}{SUFFIX}", f"{INDEX}{NEW}", CARD, *FILES.values()}
"""Names that a zoo writes itself, so that no folder in it may have them."""


@dataclass(frozen=True)
class Entry:
    """One line of an index."""

    name: str
    """Folder inside the zoo, `<base model>/<version>`."""
    base_model: str
    sha256: str
    """sha256 of the tuner file, in hexadecimal."""
    size: int
    """Size of the tuner file in bytes."""
    fingerprint: str | None
    """Hash of the base model's tensor names and shapes; None if the tuner does not know the shapes."""
    blocks: int
    licence: str | None
    url: str | None = None
    """Address of the tuner file, if it is not in the folder."""
    kind: str = "tuner"
    """"tuner", "feedback" (metazo/feedback/tuner.py), or "log" for a fine-tuned model as its step log."""


@dataclass(frozen=True)
class Found:
    """A tuner of either kind or a step log in a zoo folder."""

    entry: Entry
    folder: Path
    where: str
    """"zoo", "own", "cache" or "bundled"."""
    why: str = ""
    """The kind of match: "fingerprint", "names", "part" (of the blocks) or "base model"."""

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.folder / self.entry.name / FILES[self.entry.kind]

    def read(self) -> bytes:
        """The content of the file. Raises UserError if it cannot be read, or if a link leads to it out of the zoo."""
        return read_capped(_inside(self.path, self.folder), MAX_BYTES, "tuner")


def _inside(path: Path, folder: Path) -> Path:
    """The path. Raises UserError if a link in it leads out of the zoo's folder."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{path} leads out of the zoo through a link; remove the link")
    return path


def home() -> Path:
    """Folder of metazo beside the Hub's cache: `$HF_HOME/metazo`. Raises UserError if this user has no home folder and
    needs one."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    found = expanded(os.environ.get("HF_HOME") or Path(cache, "huggingface")) / "metazo"
    if found.parts[0].startswith("~"):
        raise UserError(
            f"the zoo's folder would be {found}, and this user has no home folder (HOME is not set, and the system "
            "names none); set HOME or HF_HOME to a folder"
        )
    return found


def cache_folder() -> Path:
    """The zoo folder that holds pulled tuners."""
    return home() / "cache"


def own_folder() -> Path:
    """The zoo folder that `push` publishes into by default: $METAZO_ZOO, or one beside the cache."""
    return Path(os.environ.get("METAZO_ZOO") or home() / "zoo")


def _bundled() -> Path:
    return Path(next(iter(pertnn_zoo.__path__)))


def folders(zoo: str | Path | None = None) -> list[tuple[str, Path]]:
    """The zoo folders in search order: the given one, the user's own, the bundled one, the cache. Those that would be in a home
    folder are left out if there is none."""
    found = []
    for where, folder in (("own", own_folder), ("bundled", _bundled), ("cache", cache_folder)):
        with suppress(UserError):
            found.append((where, folder()))
    if zoo is not None:
        if not Path(zoo).is_dir():
            raise UserError(f"`zoo` {zoo} is not a folder; give the folder that holds index.json")
        found.insert(0, ("zoo", Path(zoo)))
    return found


def read_index(folder: Path, key: str | None = None) -> list[Entry]:
    """The entries of a folder's index.json, with each field checked; no entries if there is no index.

    key: a public key; if given, there must be an index with a signature by that key.
    """
    path = folder / INDEX
    if key is None and not path.exists():
        return []
    data = read_capped(path, INDEX_BYTES, "zoo index")
    if key is not None:
        check_signature(data, path, key)
    return _entries(data, path)


def _entries(data: bytes, path: Path) -> list[Entry]:
    try:
        content = parse_json(data)
    except ValueError as error:
        raise UserError(
            f"zoo index {path} is not valid JSON; restore it from a copy, or remove it with its signature and push the files "
            "of the folder again, each with its `version`"
        ) from error
    tuners = content.get("tuners") if isinstance(content, dict) else None
    if not isinstance(tuners, list) or content.get("format_version") != FORMAT_VERSION:
        raise UserError(f"zoo index {path} is not of format_version {FORMAT_VERSION} with a list of tuners")
    found: dict[str, Entry] = {}
    for number, item in enumerate(tuners):
        entry = _entry(item, f"zoo index {path}, entry {number}")
        if entry.name in found:
            raise UserError(
                f"zoo index {path}, entry {number}: {entry.name} is listed twice; remove one of both entries"
            )
        found[entry.name] = entry
    return list(found.values())


def _entry(item: Any, origin: str) -> Entry:
    names = [entry.name for entry in fields(Entry)]
    if not isinstance(item, dict) or not set(names[:-2]) <= set(item) <= set(names):
        raise UserError(f"{origin}: its fields are not {', '.join(names)}")
    for name in ("name", "base_model", "sha256", "fingerprint", "licence", "url"):
        value = item.get(name)
        if value is None and name in ("fingerprint", "licence", "url"):
            continue
        if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= 2048:
            raise UserError(f"{origin}: {name} is not a line of text")
    if item.get("kind", "tuner") not in list(FILES):  # a kind that is a list has no hash
        raise UserError(f"{origin}: kind is none of {', '.join(FILES)}")
    for name, least in (("size", 1), ("blocks", 0)):
        if type(item[name]) is not int or not least <= item[name] <= MAX_BYTES:
            raise UserError(f"{origin}: {name} is not a number between {least} and {MAX_BYTES:,}")
    safe_name(item["name"], f"{origin}: name")
    if not re.fullmatch("[0-9a-f]{64}", item["sha256"]):
        raise UserError(f"{origin}: sha256 is not 64 hexadecimal digits")
    return Entry(**item)


def add(
    item: Item,
    data: bytes,
    folder: Path,
    base: str,
    version: str | None = None,
    licence: str | None = None,
    sign: Signer | None = None,
) -> Found:
    """Write a tuner's bytes (or a log's), its card and its index entry into a zoo folder; the entry last.

    `version` None takes the next of v1, v2, ... (feedback-v1, ...). Several processes may add at once. Adding the same
    bytes under the same name again changes nothing, except that a log gets the licence, if one is stated. Another file is
    never replaced, even if the index does not list it. `sign` makes a signature of the new index; a zoo that has one is left
    alone without it, or if the one that it has is not by the same key.
    Raises UserError if the folder cannot be written or a link in it leads out of it.
    """
    _free_name(
        f"{base}/{version}" if version else base
    )  # before its folder is looked into, and before the zoo's is made
    lock = FolderLock(folder, "zoo", PATIENCE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock:
            entries = read_index(folder)
            name = _free_name(f"{base}/{version or _next_version(folder, base, entries, item, data)}")
            target = _inside(folder / name, folder)
            if there := signed(folder / INDEX):
                if sign is None:
                    raise UserError(f"the zoo {folder} is signed; give `sign` KEY, or remove its {' and '.join(there)}")
                sign.check(folder / INDEX)
            entry = _entry_of(item, name, data, licence)
            held = next((other for other in entries if other.name == name), None)
            if held is not None and held.sha256 != entry.sha256:
                raise UserError(f"{name} is already in the zoo {folder}; publish under another `version`")
            if held is None and (other := _other_file(target, entry.kind, data)) is not None:
                raise UserError(
                    f"{other} is another file, which {INDEX} does not list; publish under another `version`, or move it away"
                )
            if held is not None:  # the licence of a log is in the index alone
                entry = replace(entry, url=held.url, licence=entry.licence or held.licence)
            after = [entry if other is held else other for other in entries] + ([entry] if held is None else [])
            index_bytes(folder, after)  # refused before anything is written
            found = Found(entry, folder, "own")
            write_whole(found.path, data)
            write_whole(target / CARD, card_of(item, name, entry.sha256, entry.licence).encode())
            write_index(folder, after, sign)
    except OSError as error:
        raise UserError(f"the zoo {folder} cannot be written ({error.strerror or error})") from error
    return found


def _free_name(name: str) -> str:
    """`name` itself. Raises UserError if it is unsafe, or if a part of it is a name that the zoo's own files have, in any
    case of letters: some file systems do not tell them apart."""
    for part in safe_name(name, "zoo name").split("/"):
        if part.lower() in TAKEN:
            raise UserError(
                f"zoo name {name!r} is refused: a zoo has files of its own called {part.lower()}; choose another `name` or "
                "`version`"
            )
    return name


def _entry_of(item: Item, name: str, data: bytes, licence: str | None) -> Entry:
    common = {"name": name, "sha256": sha256(data).hexdigest(), "size": len(data)}
    if isinstance(item, Log):
        return Entry(base_model=item.base_model, fingerprint=None, blocks=0, licence=licence, kind="log", **common)
    info = item.info
    known = {"base_model": info.base_model, "fingerprint": info.fingerprint, "licence": info.licence}
    return Entry(blocks=len(info.blocks), kind=_kind(item), **known, **common)


def _kind(item: Item) -> str:
    return {Log: "log", FeedbackTuner: "feedback", Tuner: "tuner"}[type(item)]


def index_bytes(folder: Path, entries: Sequence[Entry]) -> bytes:
    """The content of a folder's index.json. Raises UserError for entries that could not be read again."""
    content = {"format_version": FORMAT_VERSION, "tuners": [asdict(entry) for entry in entries]}
    data = (json.dumps(content, indent=1) + "\n").encode()
    if len(data) > INDEX_BYTES:
        raise UserError(f"the index of the zoo {folder} would have more than {INDEX_BYTES:,} bytes; begin another zoo")
    _entries(data, folder / INDEX)
    return data


def write_index(folder: Path, entries: Sequence[Entry], sign: Signer | None = None) -> None:
    """Write a folder's index.json, and its signature. If the signature cannot be written, the index is put back.

    The signature is made and written beside before the index is replaced. A process that is killed between the two
    replacements leaves the new index with the old signature, and the new signature in index.json.minisig.new.
    """
    path, data = folder / INDEX, index_bytes(folder, entries)
    if sign is None:
        write_whole(path, data)
        return
    new = folder / f"{INDEX}{NEW}"
    write_whole(new, sign(data, INDEX))
    before = path.read_bytes() if path.exists() else None
    try:
        write_whole(path, data)
        os.replace(new, folder / f"{INDEX}{SUFFIX}")
    except BaseException:
        if new.exists():  # else both were replaced
            if before is None:
                path.unlink(missing_ok=True)
            elif path.read_bytes() != before:
                write_whole(path, before)
            new.unlink()
        raise


def _next_version(folder: Path, base: str, entries: Sequence[Entry], item: Item, data: bytes) -> str:
    """The first version after those that are listed whose place is free: an index that was made again may not list them all."""
    start = "feedback-v" if isinstance(item, FeedbackTuner) else "v"
    taken = (re.fullmatch(re.escape(f"{base}/{start}") + r"(\d{1,9})", entry.name) for entry in entries)
    number = max((int(match[1]) for match in taken if match), default=0) + 1
    while _other_file(folder / base / f"{start}{number}", _kind(item), data) is not None:
        number += 1
    return f"{start}{number}"


def _other_file(target: Path, kind: str, data: bytes) -> Path | None:
    """A tuner or log in a version's folder that is not this one; a push that was killed may have left this one."""
    for name in sorted(set(FILES.values())):
        path = target / name
        same = name == FILES[kind] and path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
        if path.exists() and not same:
            return path
    return None
