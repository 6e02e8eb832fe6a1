"""A model without its weights: built from its configuration on torch's meta device, for plans and tables.

Names, shapes and dtypes are those of the model that `load_model` gives, and nothing of the size of the weights is read or
allocated. Of the checkpoint, the headers of its safetensors files are read: the first bytes of each, with names, shapes and
dtypes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.plain import read_json
from metazo.models.checks import check_config, kind_of
from metazo.models.dtypes import kept_wide
from metazo.models.embedded import EMBEDDED, check_folder
from metazo.models.heads import new_head
from metazo.models.load import (
    DTYPES,
    KINDS,
    NOT_POOLED,
    LoadedModel,
    configuration,
    explained,
)
from metazo.models.quantize import expect_bytes, left_over
from metazo.models.sentence import HEAD_FILE, SentenceClassifier, find, pooling_of, quiet
from metazo.models.tokenizer import context_length, read_tokenizer, set_pad

with needs("llm"):
    from transformers import AutoModel, PreTrainedConfig

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself on a header."""
MAX_INDEX_BYTES = 2**25


@dataclass(frozen=True)
class Stored:
    """The tensors of a checkpoint: shape and dtype by name (safetensors' names of dtypes), and the bytes of its files."""

    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    files: int
    bytes: int


def skeleton(
    name_or_path: str | Path,
    *,
    config: PreTrainedConfig | None = None,
    kind: str = "auto",
    dtype: str = "float32",
    num_labels: int | None = None,
    head: str = "auto",
    quantize: str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> LoadedModel:
    """The model that `load_model` would load, with all tensors on the meta device.

    Args: config: a configuration in the place of the folder's, in which case no file is read; the others as for `load_model`
    (quantize is checked, and the skeleton has full precision and the bytes of memory that the weights will have;
    attn_implementation is checked, and one that is not eager is sdpa here, which has no kernel that the meta device lacks).
    The tokenizer is None if it is not read, with a note that says why; the context length is then the configuration's.
    Raises UserError as `load_model` does for a configuration that cannot be used.
    """
    name = str(name_or_path)
    source, notes, given = str(EMBEDDED.get(name, name)), [], config is not None
    if not given:
        check_folder(source, name)
    with explained(name):
        if config is None:
            config, chosen = configuration(source, name, kind, head, quantize, revision)
        else:
            check_config(config, name)
            chosen = kind_of(config, kind, name)
        with quiet(), torch.device("meta"):
            model: Any = _built(source, config, chosen, DTYPES[dtype], num_labels, head, attn_implementation)
            _keep_wide(model, DTYPES[dtype])
            if quantize is not None:
                expect_bytes(model, quantize)
                notes += left_over(model, quantize, name)
    tokenizer, problem = (None, None) if given else _tokenizer(source, name, revision)
    if problem:
        notes.append(problem)
    if tokenizer is not None:
        set_pad(tokenizer, model)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 2048
    context = context_length(model, tokenizer) if tokenizer is not None else longest
    return LoadedModel(model.eval(), tokenizer, chosen, name, DTYPES[dtype], context, notes=notes)  # type: ignore[arg-type]


def _built(
    source: str,
    config: PreTrainedConfig,
    kind: str,
    dtype: torch.dtype,
    classes: int | None,
    head: str,
    attention: str | None,
) -> nn.Module:
    if kind != "classifier":
        return _with_head(config, kind, dtype, attention)
    config.num_labels = classes or config.num_labels or 2
    pooling = pooling_of(source) if head != "checkpoint" and Path(source).is_dir() else None
    trained = any(a.endswith("ForSequenceClassification") for a in config.architectures or ())
    if head == "checkpoint" or (head == "auto" and (trained or not pooling)):
        return _with_head(config, kind, dtype, attention)
    if attention is not None and not find(source, HEAD_FILE):
        raise UserError(NOT_POOLED)
    encoder = AutoModel.from_config(config, dtype=dtype)
    top = new_head("linear" if head == "auto" else head, config.num_labels, config.hidden_size, dtype)
    return SentenceClassifier(encoder, top, pooling or "mean")


def _with_head(config: PreTrainedConfig, kind: str, dtype: torch.dtype, attention: str | None) -> nn.Module:
    """A model of transformers' own class. Raises what transformers does for an attention that it does not have."""
    if attention is None:
        return KINDS[kind].from_config(config, dtype=dtype)
    model = KINDS[kind].from_config(config, dtype=dtype, attn_implementation=attention)
    if attention != "eager" and model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    return model


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Give the weights that transformers keeps in float32 beside narrower ones that type (`wo` of T5 beside float16)."""
    base = model.encoder if isinstance(model, SentenceClassifier) else model
    for name in kept_wide(base, dtype):
        parameter = base.get_parameter(name)
        parameter.data = parameter.data.float()


def _tokenizer(source: str, name: str, revision: str | None) -> tuple[Any, str | None]:
    try:
        with explained(name):
            return read_tokenizer(source, name, revision), None
    except UserError as error:
        return None, f"its tokenizer cannot be read, and a run needs it ({error})"


def stored(folder: Path) -> Stored | None:
    """What the headers of the safetensors files in a folder say; None if it has none. The weights are not read.

    The files are those that the index names, or all. Raises UserError for a file that is missing or is not safetensors.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        found = read_json(index, "index of a checkpoint", MAX_INDEX_BYTES)
        weight_map = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(weight_map, dict) or not all(Path(str(n)).name == n for n in weight_map.values()):
            raise UserError(f"{index} does not say which file holds which tensor; download the model again.")
        paths = [folder / name for name in dict.fromkeys(weight_map.values())]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    total = 0
    for path in paths:
        tensors |= _header(path)
        total += path.stat().st_size
    return Stored(tensors, len(paths), total) if paths else None


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            found = json.loads(file.read(length))
        return {
            name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in found.items() if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a safetensors file ({error}); download the model again.") from error
