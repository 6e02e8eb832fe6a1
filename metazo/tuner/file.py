"""A tuner: trained PertNNs and their metadata in one safetensors file.

The file holds the four stacked weights w1, b1, w2, b2 of `PertNN`, and under the metadata key `metazo` a JSON
object: the fields of `TunerInfo` and `format_version`. Tuners come from strangers, so everything is checked before a
tensor is made: sizes, shapes, names, types, and that the fingerprint matches the names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

import metazo
from metazo.errors import UserError
from metazo.io.plain import shown
from metazo.tuner.envelope import BadFile, TunerFile, blocks, check_facts, opened, packed, shapes
from metazo.tuner.markdown import licence, table, text, word
from metazo.tuner.match import BlockSpec, Match, NamedShapes, fingerprint, fit, plain_name
from metazo.tuner.networks import PertNN

FORMAT_VERSION = 1
_CHOICES = {
    "by": ("tensor", "layer"),
    "features": ("published", "log"),
    "parametrisation": ("abs", "rms_exp"),
    "embedding_count": ("numel", "published"),
}


@dataclass
class TunerInfo:
    """The model for which a tuner was trained, and how its networks are used (metazo/tuner/scale.py)."""

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
    metazo_version: str = metazo.__version__
    """Version of metazo that wrote the file."""
    licence: str | None = None
    """Licence of the tuner; None if none was stated, in which case nobody may republish it."""
    fingerprint: str | None = None
    """Hash of tensor names and shapes; computed from the blocks, None if a shape is unknown."""

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint((name, shape) for block in self.blocks for name, shape in block.tensors)


@dataclass
class Tuner(TunerFile):
    """PertNNs, one per block of `info.blocks`, and their metadata."""

    called = "tuner"
    pertnn: PertNN
    info: TunerInfo

    def to_bytes(self) -> bytes:
        """The file's content, which is the same for equal tuners. Figures that are NaN or infinite become null."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.pertnn.state_dict().items()}
        return packed(tensors, asdict(self.info), FORMAT_VERSION)

    @classmethod
    def checked(cls, data: bytes) -> TunerInfo:
        return _checked(data)

    @classmethod
    def made(cls, tensors: dict[str, Tensor], info: TunerInfo) -> Tuner:
        return cls(PertNN.from_stacked(**tensors), info)

    def card(self, name: str, sha256: str) -> str:
        """The card of the tuner published under `name`, in Markdown."""
        info = self.info
        scale = (
            "abs(PertNN)" if info.parametrisation == "abs" else f"RMS * exp(PertNN), exponent within {info.bound:.3g}"
        )
        tensors = sum(len(block.tensors) for block in info.blocks)
        return f"""# {text(name)}

A tuner for {text(info.base_model)}: it learned how strongly to perturb each block of the model's weights when the
model is fine-tuned with forward passes only (zeroth-order).

| | |
|---|---|
| base model | {text(info.base_model)} |
| blocks | {len(info.blocks)}, by {info.by}, {tensors} tensors |
| inputs | {info.features} |
| scale | {scale}{", normalised" if info.normalise else ""} |
| embeddings count as | {info.embedding_count} |
| licence | {licence(info.licence)} |
| fingerprint | {info.fingerprint or "none: the shapes of the base model are not known, it is matched by names"} |
| sha256 | {sha256} |
| written by | metazo {text(info.metazo_version) or "(version not recorded)"} |

## Use

    metazo zoo show {word(name, "NAME")}
    metazo finetune --model {word(info.base_model, "MODEL")} --task TASK --tuner {word(name, "NAME")}

It fits {text(info.base_model)} and every model with the same tensor names{" and shapes" if info.fingerprint else ""}.

## Recipe
{table({key: _counts(value) for key, value in info.recipe.items()})}
## Scores
{table(info.scores)}"""

    def fits(self, named_shapes: NamedShapes) -> Match:
        """Compare with the parameters of a model, tied ones once; see `metazo.tuner.match.fit`."""
        return fit(self.info.blocks, named_shapes)

    def check_fit(
        self, named_shapes: NamedShapes, allow_partial: bool = False, trained: Collection[str] | None = None
    ) -> Match:
        """As `fits`, but raises UserError if the tuner does not fit; the message names three differences.

        trained: names of the tensors that are trained, without which no network is used; None: all.
        """
        match = self.fits(named_shapes)
        if match.ok:
            return match
        own = None if trained is None else {plain_name(name) for name in trained}
        used = [
            i for i in match.matched if own is None or any(plain_name(n) in own for n, _ in self.info.blocks[i].tensors)
        ]
        if not used and match.matched:
            raise UserError(
                f"The tuner for {self.info.base_model} has no network for any tensor that is trained here, such as "
                f"{next(iter(trained or ()))}: train the model's own weights, or use `scale='rms'` in place of `tuner`"
            )
        if not (allow_partial and used):
            partial = "pass `allow_partial=True` to run the others at RMS scale, or " if used else ""
            raise UserError(
                f"The tuner for {self.info.base_model} does not fit this model ({match.sentence()}); "
                f"{partial}take a tuner made for this model"
            )
        return match


def _counts(value: Any) -> Any:
    """Of training rows by task, which are lists of hashes, how many there are; any other value of a recipe as it is."""
    if isinstance(value, dict) and all(isinstance(one, dict) and "contents" in one for one in value.values()):
        return {name: one.get("train") for name, one in value.items()}
    return value


def _checked(data: bytes) -> TunerInfo:
    """Check the header against the bytes and the metadata against the header; nothing is allocated."""
    header, content, payload = opened(data, FORMAT_VERSION)
    info = _info(content)
    found = shapes(header, {"w1", "b1", "w2", "b2"}, payload)
    if len(found["w1"]) != 3 or 0 in found["w1"]:
        raise BadFile("w1 is not of shape (blocks, hidden, features)")
    count, hidden, features = found["w1"]
    if [found["b1"], found["w2"], found["b2"]] != [[count, hidden], [count, hidden], [count]]:
        raise BadFile("the shapes of w1, b1, w2 and b2 contradict each other")
    if count != len(info.blocks):
        raise BadFile(f"it has networks for {count} blocks and names {len(info.blocks)}")
    if features != 5:
        raise BadFile(f"its networks take {features} inputs, the {info.features!r} features are 5")
    return info


def _info(content: dict[str, Any]) -> TunerInfo:
    """TunerInfo from the JSON object, with every field checked."""
    check_facts(content, {entry.name for entry in fields(TunerInfo)})
    for name, choices in _CHOICES.items():
        if content[name] not in choices:
            raise BadFile(f"{name} is {shown(content[name])}, not one of {', '.join(choices)}")
    bound = content["bound"]
    if not isinstance(bound, int | float) or isinstance(bound, bool) or not 0 < bound < 100:
        raise BadFile(f"bound is {shown(bound)}, not a number between 0 and 100")
    if not isinstance(content["normalise"], bool):
        raise BadFile(f"normalise is {shown(content['normalise'])}, not true or false")
    stated = content.pop("fingerprint")
    listed = content["blocks"] = blocks(content["blocks"])
    if content["by"] == "tensor" and any([name for name, _ in block.tensors] != [block.name] for block in listed):
        raise BadFile("its blocks are by tensor and not each named after its one tensor")
    info = TunerInfo(**content)
    if stated != info.fingerprint:
        raise BadFile("its fingerprint is not that of the names and shapes it lists")
    return info
