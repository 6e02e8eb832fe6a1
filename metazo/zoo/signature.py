"""Signatures of zoo indexes, in the format of minisign (https://jedisct1.github.io/minisign), by py-minisign.

The index holds the sha256 of every file of the zoo, so one signature, in `index.json.minisig` beside it, covers the whole
zoo. `minisign -Vm index.json -P KEY` checks the same file without metazo. A signature does not say whether this is the
newest index that its key signed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.files import is_file, read_capped

SUFFIX = ".minisig"
MAX_BYTES = 8192
"""Most bytes of a key or a signature."""


def check_signature(data: bytes, path: Path, key: str) -> None:
    """Check `data`, the content of the file `path`, against the signature beside it.

    key: a public key of minisign, as a file or as its line of base64. Raises UserError unless the signature matches.
    """
    minisign = _minisign()
    beside = path.with_name(path.name + SUFFIX)
    if not is_file(beside):
        raise UserError(f"{path} is not signed: there is no {beside.name} beside it")
    public = _parsed("`key`", key, minisign.PublicKey)
    try:
        minisign_signature = minisign.Signature.from_bytes(read_capped(beside, MAX_BYTES, "signature"))
        public.verify(data, minisign_signature)
    except ValueError as error:
        raise UserError(f"{path} is refused: its signature is not by the key given ({error})") from error


def signer(key: str, password: Callable[[], str]) -> Callable[[bytes, str], bytes]:
    """A function of (content, file name) that gives the content of the signature's file.

    key: a file with a secret key of minisign; `password` is called if the key has a password. Raises UserError.
    """
    secret = _parsed("`sign`", key, _minisign().SecretKey)
    try:
        if secret.is_encrypted():
            secret.decrypt(password())
    except (ValueError, MemoryError) as error:
        raise UserError(
            f"`sign`: the key in {key} cannot be used ({error or 'it asks for too much memory'})"
        ) from error

    def sign(data: bytes, name: str) -> bytes:
        return bytes(secret.sign(data, trusted_comment=f"file:{name}")) + b"\n"

    return sign


def _parsed(flag: str, key: str, kind: Any) -> Any:
    """A key from its file, or a public key from its text. Messages do not repeat the input, because it may be a secret."""
    path = Path(key).expanduser()
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
