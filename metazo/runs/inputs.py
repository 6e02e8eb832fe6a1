"""The inputs that a run's numbers depend on: weights, the model's configuration, data and the task's definition.

Configuration and definition are flat tables in the header of a log, so that a message can name a change. Short plain
values are written out; all others are represented by a hash.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metazo.io.tensorfile import weights_hash
from metazo.models.parts import forward_only
from metazo.models.sentence import SentenceClassifier
from metazo.optimizers.guards import as_loss
from metazo.runs.own import OwnBatch, OwnLoss
from metazo.tasks import Prepared
from metazo.tasks.task import Task

WORDS = 20_000  # that are split to compare tokenizers
LONGEST = 40  # characters of a value that is written out
# Fields of a transformers configuration for the origin of a model, the names of its outputs and the extra results of a
# call beside the logits. Everything else may change the numbers: activations, norms, rope, windows, scalings.
_INCIDENTAL = {
    "transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id", "use_cache", "return_dict",
    "output_hidden_states", "output_attentions", "initializer_range", "auto_map", "tokenizer_class", "pretraining_tp",
    "task_specific_params", "finetuning_task", "problem_type", "name_or_path", "distributed_config",
}  # fmt: skip
# Settings of generation that greedy decoding does not read; the length is the task's own.
_SAMPLING = {
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "num_beams",
    "max_length",
    "max_new_tokens",
}
# Cases, numbers, spaces, accents, other scripts, signs and a line break: what tokenizers split and normalise differently.
_TEXT = "Ab aB 1234567.89  I'd go,\tcafé naïve\nÜber straße; привет 東京 नमस्ते مرحبا 👍🏽 ½ ﬁ <s> def f(x): return x"
# Fields of a task that name the source of its rows; the rows themselves are hashed.
_SOURCES = {"name", "hub", "config", "revision", "train_split", "test_split", "files", "dev_rows", "unlabelled"}


def architecture(model: nn.Module) -> dict[str, Any]:
    """The fields of the model's configuration that may change what it computes, nested names joined by dots, the pooling of a
    sentence encoder, which is in a file of its own, and hashes of the buffers that are saved with the weights.
    """
    found = dict(sorted(_flat(model.config.to_dict(), _INCIDENTAL)))  # type: ignore[operator,union-attr]
    found |= {"pooling": model.pooling} if isinstance(model, SentenceClassifier) else {}
    return found | {f"buffer {name}": f"sha256:{weights_hash([('', value)])}" for name, value in _buffers(model)}


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that are saved with the weights and are whole on this process; not sparse ones, which have no bytes of the
    whole."""
    for prefix, module in model.named_modules():
        for name, value in module._buffers.items():
            if value is None or name in module._non_persistent_buffers_set:
                continue
            if value.layout == torch.strided and not value.is_meta and not hasattr(value, "placements"):
                yield f"{prefix}.{name}".lstrip("."), value


def definition(task: Task, model: nn.Module) -> dict[str, Any]:
    """The fields of the task that decide inputs, targets and scores; for generated answers with the model's settings."""
    found = {name: _short(value) for name, value in task.model_dump().items() if name not in _SOURCES}
    generation = getattr(model, "generation_config", None)
    if task.kind == "generation" and generation is not None:
        found |= {f"generation.{name}": v for name, v in _flat(generation.to_diff_dict(), _INCIDENTAL | _SAMPLING)}
    return found


def inputs(prepared: Prepared, model: nn.Module) -> dict[str, Any]:
    """`architecture` and `definition`, as fields of a header."""
    return {"architecture": architecture(model), "definition": definition(prepared.task, model)}


def belongs(model: nn.Module, tasks: Sequence[Prepared]) -> dict[str, Any]:
    """A flat table of everything that a run over several tasks depends on: weights, architecture, data, definitions."""
    found: dict[str, Any] = {"weights of the model": f"sha256:{weights_hash(model.named_parameters())}"}
    found |= {f"model's {name}": value for name, value in architecture(model).items()}
    for prepared in tasks:
        found[f"data of {prepared.task.name}"] = f"sha256:{data_hash(prepared)}"
        found |= {f"{name} of {prepared.task.name}": v for name, v in definition(prepared.task, model).items()}
    return found


def own_inputs(own: OwnLoss, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """As `inputs`, for a loss of the caller's own: the hash of the batches of each split, and the loss of the first batch at
    the start weights to three digits, because the function itself cannot be compared.
    """
    splits = {"data": own.train, "dev": own.dev, "test": own.test}
    found = {f"batches of `{name}`": f"sha256:{batches_hash(split)}" for name, split in splits.items()}
    with forward_only(model):
        first = as_loss(own.loss(model, own.train[0].to(device)))
    return {"own": found | {"loss of the first batch": f"{first:.3g}"}}


def batches_hash(batches: Sequence[OwnBatch]) -> str:
    """sha256 over the tensors, arrays and plain values of batches, in order; of an object of another type, over its class."""
    found = sha256()

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            if value.layout == torch.strided and value.numel():
                found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, np.ndarray) and value.dtype != object:
            found.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        elif isinstance(value, Mapping):
            for key in value:
                take(key)
                take(value[key])
        elif isinstance(value, list | tuple):
            found.update(f"{len(value)} items".encode())
            for item in value:
                take(item)
        elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
            found.update(repr(value).encode())
        else:
            found.update(type(value).__qualname__.encode())
        found.update(b"\n")

    for batch in batches:
        take(batch.content)
    return found.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 over the vocabulary and the tokens of a text of many scripts, whatever files they came from."""
    found = [sorted(tokenizer.get_vocab().items()), tokenizer(_TEXT)["input_ids"]]
    return sha256(json.dumps(found).encode()).hexdigest()


def tokenizing(tokenizer: Any) -> dict[str, str]:
    """Hashes of how the tokenizer splits the entries of its vocabulary (WORDS of them, evenly spread), which depends on its
    merges, and of its chat template.
    """
    entries = sorted(tokenizer.get_vocab())
    words = [entry.replace("Ġ", " ").replace("▁", " ") for entry in entries[:: max(1, -(-len(entries) // WORDS))]]
    split = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    found = {"splitting of words": split, "chat template": getattr(tokenizer, "chat_template", None)}
    return {name: f"sha256:{sha256(json.dumps(value).encode()).hexdigest()}" for name, value in found.items()}


def data_hash(prepared: Prepared) -> str:
    """sha256 over the encoded examples of all splits, in order."""
    found = sha256()
    for split in (prepared.train, prepared.dev, prepared.test):
        for example in split:
            values = [getattr(example, item.name) for item in fields(example)]
            found.update(json.dumps(values).encode() + b"\n")
        found.update(b"\n")
    return found.hexdigest()


def _flat(value: Mapping[str, Any], without: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if name in without or name.startswith("_"):
            continue
        if isinstance(item, Mapping) and item:
            yield from _flat({str(key): part for key, part in item.items()}, without, f"{prefix}{name}.")
        else:
            yield prefix + name, _short(item)


def _short(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = json.dumps(value, sort_keys=True, default=str)
    if isinstance(value, str) and len(value) <= LONGEST and value.isprintable():
        return value
    return text if len(text) <= LONGEST and text.isprintable() else f"sha256:{sha256(text.encode()).hexdigest()[:16]}"
