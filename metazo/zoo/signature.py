"""Signatures of zoo indexes, in the format of minisign (https://jedisct1.github.io/minisign), by py-minisign.

The index holds the sha256 of every tuner and step log, so one signature, in `index.json.minisig` beside it, covers them all.
It does not cover the cards, which `metazo zoo verify` compares with what it would write, and other files in the folder.
`minisign -Vm index.json -P KEY` checks the same file without metazo. A signature does not say whether this is the newest
index that its key signed.

A push writes the signature of the new index into `index.json.minisig.new`, replaces the index, and then replaces the signature.
Two files cannot be replaced in one step: a push that is killed between the two leaves an index that the old signature
does not fit. The new signature is then still beside it, so the messages can say what happened and how to mend it.
"""

from __future__ import annotations

import os
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.files import expanded, is_file, read_capped

SUFFIX = ".minisig"
NEW = f"{SUFFIX}.new"
"""Suffix of a signature whose index may not have been written yet."""
MAX_BYTES = 8192
"""Most bytes of a key or a signature."""
INDEX_BYTES = 4 * 2**20
"""Most bytes of an index."""


def check_signature(data: bytes, path: Path, key: str) -> None:
    """Check `data`, the content of the file `path`, against the signature beside it.

    key: a public key of minisign, as a file or as its line of base64. Raises UserError unless the signature matches.
    """
    _check(data, path, _parsed("`key`", key, _minisign().PublicKey))


class Signer:
    """Signs files with a secret key, and checks the signatures that it made before."""

    def __init__(self, secret: Any):
        self.secret = secret

    def __call__(self, data: bytes, name: str) -> bytes:
        """The content of the signature's file, for the content and the name of a file."""
        return bytes(self.secret.sign(data, trusted_comment=f"file:{name}")) + b"\n"

    def check(self, path: Path) -> None:
        """Raises UserError if the file `path`, which is about to be replaced, has a signature that is not by this key, or a new
        one beside it that another key made."""
        data = read_capped(path, INDEX_BYTES, "zoo index") if path.exists() else b""
        public = _minisign().PublicKey.from_secret_key(self.secret)
        new = path.with_name(path.name + NEW)
        if not signed(path, SUFFIX) and _fault(data, new, public) is not None:
            if _key_id(new) == _key_id(public):  # left by a push that was killed before it replaced an unsigned index
                return
            raise UserError(
                f"{path} is refused: {new.name} beside it, which a push that was cut off has left, is not by the key given; "
                f"push with the key that made it, or check the zoo by hand, remove {new.name} and push again, "
                "which signs it anew"
            )
        _check(
            data,
            path,
            public,
            f"; restore both files, or check the zoo by hand, remove {path.name}{SUFFIX} and push again, which signs it anew",
        )


def signer(key: str, password: Callable[[], str]) -> Signer:
    """What signs with the secret key of minisign in the file `key`; `password` is called if the key has one.

    Raises UserError.
    """
    secret = _parsed("`sign`", key, _minisign().SecretKey)
    try:
        if secret.is_encrypted():
            secret.decrypt(password())
    except (ValueError, MemoryError) as error:
        raise UserError(
            f"`sign`: the key in {key} cannot be used ({error or 'it asks for too much memory'})"
        ) from error
    return Signer(secret)


def signed(path: Path, *suffixes: str) -> list[str]:
    """The names of what is there beside the file `path` as its signature, also links that lead nowhere."""
    beside = (path.with_name(path.name + suffix) for suffix in suffixes or (SUFFIX, NEW))
    return [one.name for one in beside if os.path.lexists(one)]


def _check(data: bytes, path: Path, public: Any, advice: str = "") -> None:
    beside, new = (path.with_name(path.name + suffix) for suffix in (SUFFIX, NEW))
    fault = _fault(data, beside, public)
    if fault is None:
        return
    if _fault(data, new, public) is None:
        raise UserError(
            f"{path} is refused: the last push was cut off after it had written the index and before the signature; "
            f"{new.name} is the signature of this index by the key given, so rename it to {beside.name}"
        )
    if not is_file(beside):
        raise UserError(f"{path} is not signed: there is no {beside.name} beside it{advice}")
    raise UserError(
        f"{path} is refused: its signature is not by the key given, or one of both files has changed since ({fault}){advice}"
    )


def _fault(data: bytes, signature: Path, public: Any) -> str | None:
    """Why the signature in a file is not one of `data` by the key; None if it is one."""
    if not is_file(signature):
        return "there is none"
    try:
        public.verify(data, _minisign().Signature.from_bytes(read_capped(signature, MAX_BYTES, "signature")))
    except ValueError as error:
        return str(error)
    return None


def _key_id(of: Any) -> bytes | None:
    """The key's number in a public key, or in the file of a signature; None if the file holds none.

    Both begin with two bytes for the algorithm and eight for the number.
    """
    if not isinstance(of, Path):
        return b64decode(of.to_base64())[2:10]
    if not is_file(of):
        return None
    try:
        found = _minisign().Signature.from_bytes(read_capped(of, MAX_BYTES, "signature"))
    except ValueError:
        return None
    return b64decode(bytes(found).splitlines()[1])[2:10]


def _parsed(flag: str, key: str, kind: Any) -> Any:
    """A key from its file, or a public key from its text. Messages do not repeat the input, because it may be a secret."""
    path = expanded(key)
    try:
        if is_file(path):
            return kind.from_bytes(read_capped(path, MAX_BYTES, "key"))
        if flag == "`key`":
            return kind.from_base64(key)
    except ValueError as error:
        raise UserError(f"{flag} is not a key of minisign ({error})") from error
    raise UserError(f"{flag} is not a file; give the secret key that `minisign -G` wrote")


def _minisign() -> Any:
    with needs("sign"):
        import minisign
    return minisign
