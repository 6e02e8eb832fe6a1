"""Write safetensors tensor by tensor, with a hash of their content. The library's own writer has no hash, and holds a
second copy of all tensors in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from metazo.errors import UserError
from metazo.io.files import whole_file

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SEAL = "sha256"  # key of the metadata
THREADS = 8  # tensors that are hashed at once; each is copied to memory if its device is not the CPU
FEW = 1 << 20  # bytes that are hashed sooner than threads start


def weights_hash(tensors: Iterable[tuple[str, Tensor]], *, at_once: bool = True) -> str:
    """sha256 over names, shapes, dtypes and bytes, in hexadecimal: a hash over the lines `name shape dtype sha256`.

    Several tensors are hashed at once, without a copy of tensors on the CPU: 1 to 2 GB/s per core; one by one unless `at_once`,
    for tensors that are made as they are asked for.
    """

    def row(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        kept = getattr(getattr(tensor, "quant_state", tensor), "stored_sha256", None)
        if kept is not None:  # its form in memory has no fixed bytes
            return json.dumps([name, kept])
        return json.dumps([name, list(tensor.shape), str(tensor.dtype), sha256(_bytes(tensor)).hexdigest()])

    if at_once:
        tensors = list(tensors)
        at_once = sum(tensor.nbytes for _, tensor in tensors) > FEW
    if not at_once:
        return sha256("\n".join(map(row, tensors)).encode()).hexdigest()
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return sha256("\n".join(pool.map(row, tensors)).encode()).hexdigest()


def _bytes(tensor: Tensor) -> memoryview | bytes:
    if is_traceable_wrapper_subclass(tensor):  # quantised: whole numbers and scales
        return b"".join(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the file completely or not at all; extra memory: one tensor. Raises UserError if the disk is full."""
    with whole_file(path) as file:
        file.write(_header(tensors, metadata or {}))
        for tensor in tensors.values():
            file.write(_bytes(tensor))


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of such a file: the same bytes for the same tensors, which the library's own writer does not promise."""
    return b"".join([_header(tensors, metadata), *map(_bytes, tensors.values())])


def check_plain(tensors: Mapping[str, Tensor], remedy: str) -> None:
    """Raises UserError for a tensor that is made of others, such as a quantised weight, of which the file has no type."""
    check_dense(tensors, remedy)
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and is_traceable_wrapper_subclass(tensor):
            kind = type(tensor).__name__
            raise UserError(
                f"{name} is a {kind}, such as a quantised weight, which no safetensors file can hold: {remedy}."
            )


def check_dense(tensors: Mapping[str, Tensor], remedy: str) -> None:
    """Raises UserError for a sparse tensor."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise UserError(f"{name} is a sparse tensor, which no safetensors file can hold: {remedy}.")


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    metadata = {**metadata, SEAL: seal(tensors, metadata)}
    check_plain(tensors, "convert it to a plain tensor")
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format requires aligned data
    return len(text).to_bytes(8, "little") + text


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata. Raises SafetensorError if they have changed since they were written."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    if metadata.pop(SEAL, None) != seal(tensors, metadata):
        raise SafetensorError("its content has changed since it was written")
    return tensors, metadata


def check_tensors(path: Path) -> None:
    """Raises SafetensorError if the file cannot be read or has changed since it was written; memory: one tensor."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        stated = metadata.pop(SEAL, None)
        found = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
        if stated != _sealed(weights_hash(found, at_once=False), metadata):
            raise SafetensorError("its content has changed since it was written")


def seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 over tensors and metadata, in hexadecimal."""
    return _sealed(weights_hash(sorted(tensors.items())), metadata)


def _sealed(weights: str, metadata: Mapping[str, str]) -> str:
    return sha256(json.dumps([weights, sorted(metadata.items())]).encode()).hexdigest()
