"""The envelope of every tuner file: safetensors, with a JSON object under the metadata key `metazo`.

Tuners come from strangers, so the header is checked against the bytes, and the metadata against the header, before a tensor
is made.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from metazo.errors import UserError
from metazo.io.files import expanded, read_capped, write_whole
from metazo.io.plain import finite, is_name, is_plain, parse_json, shown
from metazo.io.tensorfile import SEAL, seal, to_bytes
from metazo.tuner.limits import MAX_BYTES, MAX_HEADER_BYTES, TUNER
from metazo.tuner.markdown import front_matter
from metazo.tuner.match import BlockSpec

DTYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


class BadFile(ValueError):
    """A fault of a tuner's bytes."""


class TunerFile(ABC):
    """A tuner of some kind, which is one file. `called`: what messages call it."""

    called: ClassVar[str]
    info: Any

    @abstractmethod
    def to_bytes(self) -> bytes:
        """The file's content, which is the same for equal tuners."""

    @classmethod
    @abstractmethod
    def checked(cls, data: bytes) -> Any:
        """The metadata, after everything in header and metadata is checked; no tensor is made. Raises BadFile."""

    @classmethod
    @abstractmethod
    def made(cls, tensors: dict[str, Tensor], info: Any) -> Self:
        """The tuner from its tensors, which are finite, and its metadata."""

    @abstractmethod
    def card(self, name: str, sha256: str) -> str:
        """The card of the tuner published under `name`, in Markdown: the base model, its use, recipe and scores."""

    def save(self, path: str | Path) -> None:
        """Write the tuner as safetensors, completely or not at all. Raises UserError if it could not be loaded again."""
        data = self.to_bytes()
        if len(data) > MAX_BYTES:
            raise UserError(
                f"The {self.called} to be written to {path} has {len(data):,} bytes, and one may have {MAX_BYTES:,}; make one "
                "of smaller networks or maps."
            )
        self.from_bytes(data, f"{self.called} to be written to {path}")
        write_whole(Path(path), data)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and check a file, or the `tuner.safetensors` of a folder. Raises UserError if it cannot be used."""
        path = Path(path)
        path = path / TUNER if path.is_dir() else path
        return cls.from_bytes(read_capped(path, MAX_BYTES, cls.called), str(path))

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Self:
        """A tuner from a folder, a file, or a repository of the Hub, whose file is checked like any other.

        Raises UserError if it cannot be had or used.
        """
        path = expanded(name)
        if path.exists():
            return cls.load(path)
        from metazo.tuner.hub import hub_file

        return cls.load(hub_file(str(name), revision, lambda said: None))

    def push_to_hub(self, repository: str, *, private: bool | None = None, branch: str | None = None) -> str:
        """Upload the tuner with its card to OWNER/NAME on the Hub, which is made if missing; returns the commit's address.

        private: for a repository that is made. branch: by default main. Raises UserError if it is refused. On the methods of
        huggingface_hub, with the arguments of its mixin; not on the mixin itself, which writes a card of its own and a
        config.json that no tuner has.
        """
        from metazo.tuner.hub import hub_push

        if Path(self.info.base_model).is_absolute():
            raise UserError(
                f"the base model of the {self.called} is the path of a folder, {self.info.base_model}, which means nothing to "
                "others; publish it with `metazo zoo push --to hub:OWNER/NAME --name MODEL`"
            )
        data = self.to_bytes()
        text = front_matter(self.info.base_model, self.info.licence) + self.card(repository, sha256(data).hexdigest())
        return hub_push(repository, data, text, private=private, branch=branch)

    @classmethod
    def from_bytes(cls, data: bytes, origin: str) -> Self:
        """Read and check bytes; `origin` names them in the message of the UserError."""
        try:
            info = cls.checked(data)
            tensors = safetensors.torch.load(data)
            _check_seal(data, tensors)
            for name, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise BadFile(f"tensor {name} holds NaN or infinite values")
            return cls.made(tensors, info)
        except (BadFile, SafetensorError) as error:
            raise UserError(f"{origin} is not a {cls.called} that can be used: {error}") from error


def opened(data: bytes, version: int) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(tensor entries of the header, the JSON object without its format_version, number of bytes of the tensors).

    Raises BadFile for bytes that are cut short, are no tuner, or are of another format version.
    """
    if len(data) < 8:
        raise BadFile("it is empty or cut short")
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise BadFile(f"its header claims {size:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed")
    if 8 + size > len(data):
        raise BadFile("it is cut short")
    header = _json(data[8 : 8 + size], "header")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("metazo"), str):
        raise BadFile("it has no `metazo` metadata, so it is some other safetensors file")
    content = _json(metadata["metazo"], "metadata")
    stated = content.pop("format_version", None)
    if stated != version or isinstance(stated, bool):
        raise BadFile(f"its format_version is {shown(stated)} and this metazo reads {version} only")
    return header, content, len(data) - 8 - size


def shapes(header: Mapping[str, Any], names: set[str], payload: int) -> dict[str, list[int]]:
    """The shapes of exactly these tensors, all of one floating-point type and of `payload` bytes. Raises BadFile."""
    if set(header) != names:
        raise BadFile(f"its tensors are not exactly {', '.join(sorted(names))}")
    found: dict[str, list[int]] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or not is_shape(entry.get("shape")):
            raise BadFile(f"tensor {name} has no valid shape")
        found[name] = entry["shape"]
    dtypes = {entry.get("dtype") for entry in header.values() if isinstance(entry.get("dtype"), str)}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise BadFile("its tensors are not all of one floating-point type")
    if sum(math.prod(shape) for shape in found.values()) * DTYPES[dtypes.pop()] != payload:
        raise BadFile("its size contradicts the shapes in its header; it is cut short or damaged")
    return found


def check_facts(content: Mapping[str, Any], names: set[str]) -> None:
    """What every kind of tuner says of itself: exactly these fields, each of its type. Raises BadFile."""
    if set(content) != names:
        raise BadFile(f"its metadata lacks or adds {shown(', '.join(sorted(set(content) ^ names)))}")
    for name, empty in (("base_model", ()), ("metazo_version", ("",)), ("licence", (None,))):
        if not is_name(content[name]) and content[name] not in empty:
            raise BadFile(f"{name} is {shown(content[name])}, not a line of text")
    for name in ("recipe", "scores"):
        if not isinstance(content[name], dict) or not is_plain(content[name]):
            raise BadFile(f"{name} is not a plain table of text and numbers")


def blocks(entries: Any) -> list[BlockSpec]:
    """Block list from JSON; it checks that every tensor belongs to one block. Raises BadFile."""
    found, seen = [], set()
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict) or set(entry) != {"name", "tensors"} or not is_name(entry["name"]):
            raise BadFile("its blocks are not each a name and a list of tensors")
        tensors = []
        for pair in entry["tensors"] if isinstance(entry["tensors"], list) else []:
            if not isinstance(pair, list) or len(pair) != 2 or not is_name(pair[0]) or pair[0] in seen:
                raise BadFile(f"block {shown(entry['name'])} lists a tensor without a name of its own")
            if pair[1] is not None and not is_shape(pair[1]):
                raise BadFile(f"tensor {shown(pair[0])} has no valid shape")
            seen.add(pair[0])
            tensors.append((pair[0], None if pair[1] is None else tuple(pair[1])))
        if not tensors:
            raise BadFile(f"block {shown(entry['name'])} has no tensors")
        found.append(BlockSpec(entry["name"], tuple(tensors)))
    if not found or len({block.name for block in found}) < len(found):
        raise BadFile("it lists no blocks, or two of one name")
    return found


def is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < 2**40 for n in value)


def _json(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise BadFile(f"its {what} is not valid JSON") from error
    if not isinstance(value, dict):
        raise BadFile(f"its {what} is not a JSON object")
    return value


def packed(tensors: Mapping[str, Tensor], content: Mapping[str, Any], version: int) -> bytes:
    """A file that `opened` reads, sealed by a hash of its tensors and metadata."""
    about = {"metazo": json.dumps(finite({"format_version": version, **content}), allow_nan=False)}
    return to_bytes(tensors, about)


def _check_seal(data: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Raises BadFile if the numbers are not those that were written; files of early versions have no seal."""
    about = dict(_json(data[8 : 8 + int.from_bytes(data[:8], "little")], "header")["__metadata__"])
    stated = about.pop(SEAL, None)
    if stated is not None and stated != seal(tensors, about):
        raise BadFile("its content has changed since it was written, so it is damaged: get it again")
