"""The networks in a published `.pth`: the zip archive of torch.save around the pickle that pickled.py reads.

Everything is checked against the actual bytes: entries are not compressed and do not overlap or repeat, and the tensors
together are no larger than the file, whatever their strides are.
The worst hostile files that were tried took 165 MB and 4 seconds.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metazo.errors import UserError
from metazo.io.files import read_capped
from metazo.tuner.networks import SequentialWeights
from metazo.zoo import pickled

MAX_BYTES = 16 * 2**20
"""Most bytes of a `.pth`: five times the largest published one."""
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def read_networks(path: Path) -> tuple[dict[str, SequentialWeights], str]:
    """Networks by tensor name, in float32 (float64 if the file is), and the type they were stored in.

    Raises UserError for anything but a dictionary of `nn.Sequential(Linear, Tanh, Linear(., 1))`.
    """
    data = read_capped(path, MAX_BYTES, "tuner")
    try:
        return _networks(_Archive(data)) if data[:4] == b"PK\x03\x04" else _not_an_archive(data)
    except pickled.Refused as error:
        raise UserError(f"{path} cannot be imported: its pickle {error}") from error
    except _BadFile as error:
        raise UserError(f"{path} cannot be imported: {error}") from error


class _BadFile(ValueError):
    """A fault of the archive or of its content."""


def _not_an_archive(data: bytes) -> Any:
    """Refuse a file that is not an archive. A bare pickle is interpreted for a better message; nothing is imported from it."""
    pickled.read(data)
    raise _BadFile("it is not a zip archive of torch.save; save it again with torch 1.6 or later")


class _Archive:
    """The archive's pickle, and its storages as tensors."""

    def __init__(self, data: bytes) -> None:
        try:
            self.zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OSError) as error:
            raise _BadFile("its zip archive is damaged or cut short") from error
        entries = self.zip.infolist()
        self.entries = {entry.filename: entry for entry in entries}
        if len(self.entries) < len(entries) or any(entry.compress_type for entry in entries):
            raise _BadFile("its zip entries repeat or are compressed, which those of torch.save never are")
        if sum(entry.file_size for entry in entries) > len(data):
            raise _BadFile("its zip entries claim more bytes than the file has")
        pickles = [name for name in self.entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _BadFile(f"it has {len(pickles)} entries data.pkl, and torch.save writes one")
        self.folder = pickles[0].removesuffix("data.pkl")
        order = self.bytes("byteorder") if f"{self.folder}byteorder" in self.entries else b"little"
        if order not in (b"little", b"big"):
            raise _BadFile("its byte order is neither little nor big")
        self.order = "<" if order == b"little" else ">"
        self.room = len(data)
        self.storages: dict[str, bytes] = {}

    def bytes(self, name: str) -> bytes:
        """The content of an entry in the folder of data.pkl."""
        try:
            return self.zip.read(self.entries[self.folder + name])
        except KeyError as error:
            raise _BadFile(f"its entry {name[:60]!a} is missing") from error
        except (zipfile.BadZipFile, ValueError, RuntimeError, struct.error, OSError, EOFError) as error:
            raise _BadFile(f"its entry {name[:60]!a} is damaged") from error

    def tensor(self, reference: Any) -> Tensor:
        """The tensor of a TensorRef, as a copy, in its stored type."""
        if not isinstance(reference, pickled.TensorRef):
            raise _BadFile("a network lacks a weight or a bias")
        storage, shape, stride = reference.storage, reference.shape, reference.stride
        dtype = _DTYPES[storage.dtype]
        if storage.key not in self.storages:
            self.storages[storage.key] = self.bytes(f"data/{storage.key}")
        raw = self.storages[storage.key]
        if len(raw) != storage.elements * dtype.itemsize:
            raise _BadFile(f"storage {storage.key[:60]!a} is not of the size that the pickle states")
        if len(shape) != len(stride) or not 1 <= len(shape) <= 2 or 0 in shape:
            raise _BadFile("a weight or bias has an impossible shape")
        last = reference.offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        self.room -= math.prod(shape) * dtype.itemsize
        if last >= storage.elements or self.room < 0:
            raise _BadFile("a tensor reaches beyond the numbers stored for it")
        word, size = f"u{dtype.itemsize}", dtype.itemsize
        steps = [step * size for step in stride]
        view = np.ndarray(shape, f"{self.order}{word}", raw, reference.offset * size, steps)
        return torch.from_numpy(view.astype(f"={word}", order="C")).view(dtype)


def _networks(archive: _Archive) -> tuple[dict[str, SequentialWeights], str]:
    content = pickled.read(archive.bytes("data.pkl"))
    if type(content) is not dict or not content:
        raise _BadFile("it does not hold a dictionary of networks")
    networks, stored = {}, set()
    for name, network in content.items():
        if type(name) is not str or not name.isprintable() or not 0 < len(name) <= 512:
            raise _BadFile("a network is not under the name of a tensor")
        parts = [_part(network, "Sequential", "_modules", key) for key in ("0", "1", "2")]
        _part(parts[1], "Tanh", "_parameters")
        tensors = [
            archive.tensor(_part(layer, "Linear", "_parameters", key))
            for layer in (parts[0], parts[2])
            for key in ("weight", "bias")
        ]
        stored.update(tensor.dtype for tensor in tensors)
        networks[name] = tuple(tensors)
    _check_form(networks)
    widest = torch.float64 if torch.float64 in stored else torch.float32
    converted = {name: tuple(tensor.to(widest) for tensor in net) for name, net in networks.items()}
    return converted, "/".join(sorted(str(dtype).removeprefix("torch.") for dtype in stored))


def _part(module: Any, kind: str, table: str, key: str | None = None) -> Any:
    """`module.<table>[key]` of a module of this kind; `key` None checks the kind alone."""
    if type(module) is not pickled.Module or module.kind != kind:
        raise _BadFile(f"a network is not Linear, Tanh, Linear in a Sequential (no {kind} where there should be)")
    members = module.state.get(table)
    if key is None:
        return None
    if type(members) is not dict or key not in members:
        raise _BadFile(f"a {kind} lacks its {key}")
    return members[key]


def _check_form(networks: dict[str, SequentialWeights]) -> None:
    """Check that all networks have one form, Linear(features, hidden), Tanh, Linear(hidden, 1), and are finite."""
    first = next(iter(networks.values()))[0]
    hidden, features = first.shape[0], first.shape[-1]
    form = [(hidden, features), (hidden,), (1, hidden), (1,)]
    for name, tensors in networks.items():
        if [tuple(tensor.shape) for tensor in tensors] != form:
            wanted = f"Linear({features}, {hidden}), Tanh, Linear({hidden}, 1)"
            raise _BadFile(f"the network of {name!a} is not of the form {wanted}")
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise _BadFile(f"the network of {name!a} holds NaN or infinite values")
