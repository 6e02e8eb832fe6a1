"""Get a tuner by what a user calls it: a path, a name in a zoo, an https address, or a Hub repository.

What comes from elsewhere is checked whole, in memory, before a byte of it is written; so an interrupted or refused
pull leaves nothing behind.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Callable
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from metazo.errors import UserError
from metazo.files import read_capped, safe_name
from metazo.tuner import MAX_BYTES, Tuner
from metazo.zoo.hub import hub_file
from metazo.zoo.index import TUNER_FILE, Entry, Found, add, cache_folder, read_index
from metazo.zoo.search import checked, named, tuners

Report = Callable[[str], None]
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_SECONDS = 30


def load(source: str | Path, zoo: str | Path | None = None, report: Report = print) -> Tuner:
    """The tuner that `source` names, checked; `report` is told of downloads. Raises UserError.

    In this order: a tuner file or a folder with one; a name in the zoo folders (`pico`, `pico/v1`); an https address,
    optionally ending in `#sha256=...`; a Hub repository `org/name`, `org/name@revision`, also with `#sha256=...`.
    """
    return _fetch(str(source), zoo, report)[1]


def pull(source: str | Path, zoo: str | Path | None = None, report: Report = print) -> Found:
    """`load`, and keep a copy in the cache, where it is found by its model's fingerprint from then on."""
    data, tuner = _fetch(str(source), zoo, report)
    return add(data, tuner, cache_folder(), zoo_base(tuner.info.base_model), sha256(data).hexdigest()[:16])


def zoo_base(base_model: str) -> str:
    """The folder of a zoo that tuners for this base model are in: its name, or the last part of it if it is a path."""
    try:
        if not Path(base_model).exists():
            return safe_name(base_model, "base model")
    except (UserError, OSError):
        pass
    last = re.sub(r"[^A-Za-z0-9._+-]+", "-", re.split(r"[/\\]", base_model.rstrip("/\\"))[-1]).strip(".-_+")[:90]
    return safe_name(last or "model", "base model")


def _fetch(source: str, zoo: str | Path | None, report: Report) -> tuple[bytes, Tuner]:
    address, _, wanted = source.partition("#sha256=")
    if wanted and not re.fullmatch("[0-9a-fA-F]{64}", wanted):
        raise UserError(f"--tuner {shown(source)}: sha256 is not 64 hexadecimal digits")
    data = _cached(wanted.lower()) if wanted else None
    if data is None:
        data, entry = _read(address, zoo, report)
        if entry is not None:
            return data, checked(data, entry, f"tuner {entry.name}")
    found = sha256(data).hexdigest()
    if wanted and found != wanted.lower():
        raise UserError(f"{shown(address)} has sha256 {found} and not the {wanted.lower()} asked for; it is refused")
    return data, Tuner.from_bytes(data, shown(address))


def _read(source: str, zoo: str | Path | None, report: Report) -> tuple[bytes, Entry | None]:
    """The bytes of a tuner, and its index entry if it has one."""
    if re.match(r"https?://", source):
        return download(source, report=report), None
    path = Path(source).expanduser()
    if _exists(path):
        return _local(path, report)
    tuner = named(source, zoo)
    if tuner is not None:
        return _from_zoo(tuner, report)
    repository, _, revision = source.removeprefix("hub:").partition("@")
    if re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repository) and ".." not in source:
        return read_capped(hub_file(repository, revision or None, report), MAX_BYTES, "tuner"), None
    known = ", ".join(sorted({found.entry.name for found in tuners(zoo)})) or "none yet"
    raise UserError(
        f"--tuner {source[:200]!r} is no file, no folder, no https address, no Hub repository org/name, and no name "
        f"in the zoos (which hold: {known})"
    )


def _local(path: Path, report: Report) -> tuple[bytes, Entry | None]:
    """A tuner file, a folder with tuner.safetensors, or a zoo folder that holds one tuner."""
    if not path.is_dir():
        return read_capped(path, MAX_BYTES, "tuner"), None
    if (path / TUNER_FILE).exists():
        return read_capped(path / TUNER_FILE, MAX_BYTES, "tuner"), None
    entries = read_index(path)
    if len(entries) == 1:
        return _from_zoo(Found(entries[0], path, "zoo"), report)
    names = ", ".join(entry.name for entry in entries)
    hint = f"it is a zoo of {names}: name one and pass --zoo {path}" if names else f"it has no {TUNER_FILE}"
    raise UserError(f"--tuner {path} is a folder that holds no single tuner; {hint}")


def _from_zoo(tuner: Found, report: Report) -> tuple[bytes, Entry]:
    """The file of a zoo folder, or from the address in its index."""
    entry = tuner.entry
    if entry.url is None or tuner.path.exists():
        return read_capped(tuner.path, MAX_BYTES, "tuner"), entry
    return _cached(entry.sha256) or download(entry.url, entry.size, report), entry


def _cached(digest: str) -> bytes | None:
    """The bytes of this sha256 from the cache, if they are there undamaged."""
    for entry in read_index(cache_folder()):
        path = cache_folder() / entry.name / TUNER_FILE
        if entry.sha256 == digest and path.is_file():
            data = read_capped(path, MAX_BYTES, "cached tuner")
            if sha256(data).hexdigest() == digest:
                return data
    return None


def download(address: str, size: int | None = None, report: Report = print) -> bytes:
    """The file at an https address (http only on this machine), of `size` bytes if that is known.

    The size is announced first; more bytes than announced, or than MAX_BYTES, are not read. Raises UserError.
    """
    name = shown(address)
    try:
        _check_scheme(address)
        request = urllib.request.Request(address, headers={"User-Agent": "metazo", "Accept-Encoding": "identity"})
        with urllib.request.build_opener(_Redirects()).open(request, timeout=_SECONDS) as response:
            length = response.headers.get("Content-Length")
            announced = int(length) if length and length.isascii() and length.isdigit() else size
            if announced is None:
                raise UserError(f"{name} does not announce its size; download it by hand and pull the file")
            if announced > MAX_BYTES or (size is not None and announced != size):
                limit = f"{size:,} in the zoo index" if size is not None else f"{MAX_BYTES:,} allowed"
                raise UserError(f"{name} announces {announced:,} bytes, not the {limit}; it is refused")
            report(f"pulling {name} ({announced:,} bytes)")
            data = response.read(announced + 1)
    except urllib.error.HTTPError as error:
        raise UserError(f"{name} cannot be pulled: the server answers {error.code}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{name} cannot be pulled ({type(reason).__name__}); check the address and network") from error
    if len(data) != announced:
        raise UserError(f"{name} ended after {len(data):,} of {announced:,} bytes; pull it again")
    return data


def shown(address: str) -> str:
    """An address without user, password, query and fragment, which may be secrets."""
    if "://" not in address:
        return address
    try:
        parts = urlsplit(address)
        return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    except ValueError:
        return "the address"


def _check_scheme(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise UserError(f"{shown(address)} is not an https address; nothing is pulled over an open line")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but only to where a pull may go."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
