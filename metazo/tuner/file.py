"""A tuner: trained PertNNs and their metadata in one safetensors file.

The file holds the four stacked weights w1, b1, w2, b2 of `PertNN`, and under the metadata key `metazo` a JSON
object: the fields of `TunerInfo` and `format_version`. Tuners come from strangers, so everything is checked before a
tensor is made: sizes, shapes, names, types, and that the fingerprint matches the names and shapes.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from metazo.errors import UserError
from metazo.io.files import read_capped, write_whole
from metazo.io.plain import is_name, is_plain, parse_json, shown
from metazo.tuner.match import BlockSpec, Match, NamedShapes, fingerprint, fit
from metazo.tuner.networks import PertNN

FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**20
"""Most bytes of a tuner: 35,000 blocks of the published form."""
MAX_HEADER_BYTES = 4 * 2**20
_DTYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_CHOICES = {
    "by": ("tensor", "layer"),
    "features": ("published", "log"),
    "parametrisation": ("abs", "rms_exp"),
    "embedding_count": ("numel", "published"),
}


@dataclass
class TunerInfo:
    """The model for which a tuner was trained, and how its networks are used (metazo/step/scales.py)."""

    base_model: str
    """Path or Hub id of the base model, as given when it was trained."""
    blocks: list[BlockSpec]
    """The blocks, in the order of the stacked weights."""
    by: str = "tensor"
    """"tensor" or "layer": the unit that shares one scale."""
    features: str = "published"
    """"published" (mean, variance, L+, L-, sigma) or "log": the inputs of the networks."""
    parametrisation: str = "abs"
    """"abs" (published) or "rms_exp" (RMS of the block times a bounded exponential)."""
    bound: float = math.log(3)
    """Bound on the exponent of "rms_exp", natural logarithm."""
    normalise: bool = True
    """Whether scales are normalised to a mean square of 1 over the entries."""
    embedding_count: str = "numel"
    """Number of entries that an embedding counts for: "numel", or the "published" 15 * batch * width."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """How it was trained."""
    scores: dict[str, Any] = field(default_factory=dict)
    """Measurements with the tuner."""
    metazo_version: str = field(default_factory=lambda: version("metazo"))
    """Version of metazo that wrote the file."""
    licence: str | None = None
    """Licence of the tuner; None if none was stated, in which case nobody may republish it."""
    fingerprint: str | None = None
    """Hash of tensor names and shapes; computed from the blocks, None if a shape is unknown."""

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint((name, shape) for block in self.blocks for name, shape in block.tensors)


@dataclass
class Tuner:
    """PertNNs, one per block of `info.blocks`, and their metadata."""

    pertnn: PertNN
    info: TunerInfo

    def to_bytes(self) -> bytes:
        """The file's content, which is the same for equal tuners. Figures that are NaN or infinite become null."""
        content = {"format_version": FORMAT_VERSION, **asdict(self.info)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.pertnn.state_dict().items()}
        return safetensors.torch.save(tensors, {"metazo": json.dumps(_finite(content), allow_nan=False)})

    def save(self, path: str | Path) -> None:
        """Write the tuner as safetensors, completely or not at all."""
        data = self.to_bytes()
        Tuner.from_bytes(data, f"tuner to be written to {path}")
        write_whole(Path(path), data)

    @classmethod
    def load(cls, path: str | Path) -> Tuner:
        """Read and check a tuner file, or the `tuner.safetensors` of a folder. Raises UserError if it cannot be used."""
        path = Path(path)
        path = path / "tuner.safetensors" if path.is_dir() else path
        return cls.from_bytes(read_capped(path, MAX_BYTES, "tuner"), str(path))

    @classmethod
    def from_bytes(cls, data: bytes, origin: str) -> Tuner:
        """Read and check a tuner's bytes; `origin` names them in the message of the UserError."""
        try:
            info = _checked(data)
            tensors = safetensors.torch.load(data)
            for name, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    raise _BadFile(f"tensor {name} holds NaN or infinite values")
            return cls(PertNN.from_stacked(**tensors), info)
        except (_BadFile, SafetensorError) as error:
            raise UserError(f"{origin} is not a tuner that can be used: {error}") from error

    def fits(self, named_shapes: NamedShapes) -> Match:
        """Compare with the parameters of a model, tied ones once; see `metazo.tuner.match.fit`."""
        return fit(self.info.blocks, named_shapes)

    def check_fit(self, named_shapes: NamedShapes, allow_partial: bool = False) -> Match:
        """As `fits`, but raises UserError if the tuner does not fit; the message names three differences."""
        match = self.fits(named_shapes)
        if not match.ok and not (allow_partial and match.matched):
            partial = "pass `allow_partial=True` to run the others at RMS scale, or " if match.matched else ""
            raise UserError(
                f"The tuner for {self.info.base_model} does not fit this model ({match.sentence()}); "
                f"{partial}take a tuner made for this model"
            )
        return match


class _BadFile(ValueError):
    """A fault of a tuner's bytes."""


def _checked(data: bytes) -> TunerInfo:
    """Check the header against the bytes and the metadata against the header; nothing is allocated."""
    if len(data) < 8:
        raise _BadFile("it is empty or cut short")
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise _BadFile(f"its header claims {size:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed")
    if 8 + size > len(data):
        raise _BadFile("it is cut short")
    header = _json(data[8 : 8 + size], "header")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("metazo"), str):
        raise _BadFile("it has no `metazo` metadata, so it is some other safetensors file")
    content = _json(metadata["metazo"], "metadata")
    stated = content.pop("format_version", None)
    if stated != FORMAT_VERSION or isinstance(stated, bool):
        raise _BadFile(f"its format_version is {shown(stated)} and this metazo reads {FORMAT_VERSION} only")
    info = _info(content)
    _check_tensors(header, info, len(data) - 8 - size)
    return info


def _check_tensors(header: dict[str, Any], info: TunerInfo, payload: int) -> None:
    """Check shapes and types of w1, b1, w2, b2 in the header against the blocks and the number of bytes."""
    if set(header) != {"w1", "b1", "w2", "b2"}:
        raise _BadFile("its tensors are not exactly w1, b1, w2 and b2")
    shapes: dict[str, list[int]] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or not _is_shape(entry.get("shape")):
            raise _BadFile(f"tensor {name} has no valid shape")
        shapes[name] = entry["shape"]
    dtypes = {entry.get("dtype") for entry in header.values() if isinstance(entry.get("dtype"), str)}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        raise _BadFile("its tensors are not all of one floating-point type")
    if len(shapes["w1"]) != 3 or 0 in shapes["w1"]:
        raise _BadFile("w1 is not of shape (blocks, hidden, features)")
    blocks, hidden, features = shapes["w1"]
    if [shapes["b1"], shapes["w2"], shapes["b2"]] != [[blocks, hidden], [blocks, hidden], [blocks]]:
        raise _BadFile("the shapes of w1, b1, w2 and b2 contradict each other")
    if blocks != len(info.blocks):
        raise _BadFile(f"it has networks for {blocks} blocks and names {len(info.blocks)}")
    if features != 5:
        raise _BadFile(f"its networks take {features} inputs, the {info.features!r} features are 5")
    if sum(math.prod(shape) for shape in shapes.values()) * _DTYPES[dtypes.pop()] != payload:
        raise _BadFile("its size contradicts the shapes in its header; it is cut short or damaged")


def _info(content: dict[str, Any]) -> TunerInfo:
    """TunerInfo from the JSON object, with every field checked."""
    names = {entry.name for entry in fields(TunerInfo)}
    if set(content) != names:
        raise _BadFile(f"its metadata lacks or adds {shown(', '.join(sorted(set(content) ^ names)))}")
    for name, choices in _CHOICES.items():
        if content[name] not in choices:
            raise _BadFile(f"{name} is {shown(content[name])}, not one of {', '.join(choices)}")
    bound = content["bound"]
    if not isinstance(bound, int | float) or isinstance(bound, bool) or not 0 < bound < 100:
        raise _BadFile(f"bound is {shown(bound)}, not a number between 0 and 100")
    if not isinstance(content["normalise"], bool):
        raise _BadFile(f"normalise is {shown(content['normalise'])}, not true or false")
    for name, empty in (("base_model", ()), ("metazo_version", ("",)), ("licence", (None,))):
        if not is_name(content[name]) and content[name] not in empty:
            raise _BadFile(f"{name} is {shown(content[name])}, not a line of text")
    for name in ("recipe", "scores"):
        if not isinstance(content[name], dict) or not is_plain(content[name]):
            raise _BadFile(f"{name} is not a plain table of text and numbers")
    stated = content.pop("fingerprint")
    blocks = content["blocks"] = _blocks(content["blocks"])
    if content["by"] == "tensor" and any([name for name, _ in block.tensors] != [block.name] for block in blocks):
        raise _BadFile("its blocks are by tensor and not each named after its one tensor")
    info = TunerInfo(**content)
    if stated != info.fingerprint:
        raise _BadFile("its fingerprint is not that of the names and shapes it lists")
    return info


def _blocks(entries: Any) -> list[BlockSpec]:
    """Block list from JSON; it checks that every tensor belongs to one block."""
    blocks, seen = [], set()
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict) or set(entry) != {"name", "tensors"} or not is_name(entry["name"]):
            raise _BadFile("its blocks are not each a name and a list of tensors")
        tensors = []
        for pair in entry["tensors"] if isinstance(entry["tensors"], list) else []:
            if not isinstance(pair, list) or len(pair) != 2 or not is_name(pair[0]) or pair[0] in seen:
                raise _BadFile(f"block {shown(entry['name'])} lists a tensor without a name of its own")
            if pair[1] is not None and not _is_shape(pair[1]):
                raise _BadFile(f"tensor {shown(pair[0])} has no valid shape")
            seen.add(pair[0])
            tensors.append((pair[0], None if pair[1] is None else tuple(pair[1])))
        if not tensors:
            raise _BadFile(f"block {shown(entry['name'])} has no tensors")
        blocks.append(BlockSpec(entry["name"], tuple(tensors)))
    if not blocks or len({block.name for block in blocks}) < len(blocks):
        raise _BadFile("it lists no blocks, or two of one name")
    return blocks


def _json(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise _BadFile(f"its {what} is not valid JSON") from error
    if not isinstance(value, dict):
        raise _BadFile(f"its {what} is not a JSON object")
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < 2**40 for n in value)
