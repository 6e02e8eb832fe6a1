"""A feedback tuner: the mean Jacobians of one base model's blocks and their metadata, in one safetensors file.

The file holds `down` (n, d, r), `up` (n, r, d) and `trust` (n,), float32, for the outputs of n = L - 1 of L blocks from the
lowest one up, and under the metadata key `metazo` a JSON object: the fields of `FeedbackInfo` and `format_version`. The
last block needs no map, because delta is exact at its output.
A tuner belongs to the blocks of its base model, by the names and shapes of their tensors within the list of blocks:
embeddings, head and the class that wraps the model may differ. Files are checked as strictly as those of other tuners
(metazo/tuner/envelope.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

import metazo
from metazo.errors import UserError
from metazo.feedback.residual import find_residual
from metazo.feedback.surrogates import MeanJacobian
from metazo.tuner.envelope import BadFile, TunerFile, blocks, check_facts, opened, packed, shapes
from metazo.tuner.markdown import figure, licence, table, text, word
from metazo.tuner.match import BlockSpec, fingerprint, fit

FORMAT_VERSION = 1
KIND = "feedback"
TENSORS = {"down", "up", "trust"}
_ADAPTERS = ("lora_", "ia3_")  # in names of peft; the weight beside them is that of `base_layer`


@dataclass
class FeedbackInfo:
    """The model for which feedback was fitted, and how."""

    base_model: str
    """Path or Hub id of the base model, as given when it was fitted."""
    blocks: list[BlockSpec]
    """Every block of the stream from the lowest one up; tensors are named within the list of blocks."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """How it was fitted."""
    scores: dict[str, Any] = field(default_factory=dict)
    """Measurements with it, beside the skip rule."""
    metazo_version: str = metazo.__version__
    """Version of metazo that wrote the file."""
    licence: str | None = None
    """Licence of the tuner; None if none was stated, in which case nobody may republish it."""
    fingerprint: str | None = None
    """Hash of tensor names and shapes of the blocks; computed from them."""
    kind: str = KIND
    """What the file is, so that no other reader takes it for one of its own."""

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint((name, shape) for block in self.blocks for name, shape in block.tensors)


@dataclass
class FeedbackTuner(TunerFile):
    """Maps by block index, `0` to `len(info.blocks) - 2`, and their metadata."""

    called = "feedback tuner"
    maps: MeanJacobian
    info: FeedbackInfo

    def to_bytes(self) -> bytes:
        """The file's content, which is the same for equal tuners."""
        order = sorted(self.maps.down)
        tensors = {
            "down": torch.stack([self.maps.down[index] for index in order]),
            "up": torch.stack([self.maps.up[index] for index in order]),
            "trust": torch.tensor([float(self.maps.trust[index]) for index in order], dtype=torch.float32),
        }
        plain = {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}
        return packed(plain, asdict(self.info), FORMAT_VERSION)

    @classmethod
    def checked(cls, data: bytes) -> FeedbackInfo:
        return _checked(data)

    @classmethod
    def made(cls, tensors: dict[str, Tensor], info: FeedbackInfo) -> FeedbackTuner:
        return cls(_maps(**tensors), info)

    def card(self, name: str, sha256: str) -> str:
        """The card of the tuner published under `name`, in Markdown."""
        info, maps = self.info, self.maps
        width, rank = next(iter(maps.down.values())).shape
        model = word(info.base_model, "MODEL")
        return f"""# {text(name)}

Feedback for {text(info.base_model)}: the mean Jacobians of its blocks, fitted without labels. Method `feedback` multiplies the
error after the last block by them to estimate the error at every lower block.

| | |
|---|---|
| base model | {text(info.base_model)} |
| maps | {len(maps.down)}, for the outputs of all blocks but the last; identity + rank {rank}, width {width} |
| trust, from the lowest block up | {", ".join(figure(float(maps.trust[index])) for index in sorted(maps.trust))} |
| licence | {licence(info.licence)} |
| fingerprint | {info.fingerprint} |
| sha256 | {sha256} |
| written by | metazo {text(info.metazo_version) or "(version not recorded)"} |

## Use

    metazo finetune --model {model} --task TASK --optimizer feedback --tuner {word(name, "NAME")}

It fits {text(info.base_model)} and every model whose blocks have the same tensor names and shapes. The control is
`--optimizer skip-feedback`, which needs no tuner.

## Recipe
{table(info.recipe)}
## Scores
{table(info.scores)}"""

    def check_fit(self, model: nn.Module) -> None:
        """Raises UserError, which names the first differences, unless the model's blocks have the tuner's tensors."""
        match = fit(self.info.blocks, block_shapes(model))
        if not match.ok:
            raise UserError(
                f"The feedback for {self.info.base_model} does not fit this model's blocks ({match.sentence()}); take one "
                "that was fitted for this model, or `optimizer='skip-feedback'`, which needs none."
            )


def describe(model: nn.Module, base_model: str, **facts: Any) -> FeedbackInfo:
    """The facts about feedback that is fitted for this model. Raises UserError if it has no residual stream."""
    grouped: dict[str, list[tuple[str, Sequence[int]]]] = {}
    for name, shape in block_shapes(model):
        grouped.setdefault(name.partition(".")[0], []).append((name, shape))
    return FeedbackInfo(base_model, [BlockSpec(index, tensors) for index, tensors in grouped.items()], **facts)


def block_shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Names within the list of blocks, and shapes, of all tensors of the blocks; peft's adapters are left out."""
    return [(name, tuple(tensor.shape)) for name, tensor in block_tensors(model)]


def block_tensors(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """As `block_shapes`, with the tensors themselves."""
    prefix = f"{find_residual(model).path}."
    return [
        (name.removeprefix(prefix).replace(".base_layer.", "."), parameter)
        for name, parameter in model.named_parameters()
        if name.startswith(prefix) and not any(part in name for part in _ADAPTERS)
    ]


def is_feedback(data: bytes) -> bool:
    """Whether a tuner's bytes say that they are feedback; any other fault is left to the reader of its kind."""
    try:
        return opened(data, FORMAT_VERSION)[1].get("kind") == KIND
    except BadFile:
        return False


def _maps(down: Tensor, up: Tensor, trust: Tensor) -> MeanJacobian:
    return MeanJacobian(dict(enumerate(down.float())), dict(enumerate(up.float())), dict(enumerate(trust.tolist())))


def _checked(data: bytes) -> FeedbackInfo:
    """Check the header against the bytes and the metadata against the header; nothing is allocated."""
    header, content, payload = opened(data, FORMAT_VERSION)
    if content.get("kind") != KIND:
        what = "it is a tuner of block scales" if "parametrisation" in content else "its metadata names another kind"
        raise BadFile(f"{what}; feedback is what metazo meta-train --learn feedback writes")
    check_facts(content, {entry.name for entry in fields(FeedbackInfo)})
    found = shapes(header, TENSORS, payload)
    if len(found["down"]) != 3:
        raise BadFile("down is not of shape (blocks, width, rank)")
    count, width, rank = found["down"]
    if [found["up"], found["trust"]] != [[count, rank, width], [count]] or 0 in (count, width) or rank > width:
        raise BadFile("the shapes of down, up and trust contradict each other")
    content["blocks"] = blocks(content["blocks"])
    if count != len(content["blocks"]) - 1:
        raise BadFile(
            f"it has maps for {count} blocks and names {len(content['blocks'])}, of which the last needs none"
        )
    stated = content.pop("fingerprint")
    info = FeedbackInfo(**content)
    if info.fingerprint is None or stated != info.fingerprint:
        raise BadFile("its fingerprint is not that of the names and shapes it lists")
    return info
