"""Imports published pickled tuners (`.pth`) as metazo tuners, without executing the pickle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.files import is_file, read_capped
from metazo.io.plain import parse_json
from metazo.tuner.file import Tuner, TunerInfo
from metazo.tuner.match import BlockSpec
from metazo.tuner.networks import PertNN
from metazo.zoo.layout import layout, unwrapped
from metazo.zoo.torchfile import read_networks

MAX_CONFIG_BYTES = 2**20
MOST_LAYERS, MOST_LABELS = 1000, 2**17


def import_pth(path: str | Path, base_model: str, model: str | Path | None = None, licence: str | None = None) -> Tuner:
    """The tuner in a `.pth` of the published code (arXiv 2510.00419): a dict of tensor name to Linear-Tanh-Linear.

    Such a file names tensors without their shapes; their order does not matter, and a wrapper's prefix (`module.`) is
    removed. The layouts of Llama, Qwen2, Qwen3 and OPT are recognised, and refused if a layer lacks a tensor; any other
    layout is imported by its names, and the recipe records the layout. Without `model` the tuner has no fingerprint and
    fits a model by names alone; with `model`, a folder holding the base model's config.json, the shapes come from there,
    and a name that differs is a UserError. Weights are kept in float32 (float16 is exact in it; the published code
    evaluates such networks in float16). Features, absolute value, normalisation and embedding count are as published.
    """
    path = Path(path)
    networks, stored = read_networks(path)
    names = unwrapped(networks)
    try:
        found = layout(names)
    except UserError as error:
        raise UserError(f"{path} cannot be imported: {error}") from error
    shapes = dict(model_shapes(model)) if model is not None else {}
    tuner = Tuner(
        PertNN.from_sequentials(list(networks.values())),
        TunerInfo(
            base_model=base_model,
            blocks=[BlockSpec(name, [(name, shapes.get(name))]) for name in names],
            embedding_count="published",
            recipe={"imported from": path.name, "stored type": stored, "layout": found},
            licence=licence,
        ),
    )
    if model is not None:
        match = tuner.fits(shapes.items())
        if not match.ok:
            raise UserError(f"{path} is not a tuner for the model in {model}: {match.sentence()}")
    return Tuner.from_bytes(tuner.to_bytes(), str(path))


def model_shapes(folder: str | Path) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model's parameters, tied ones once, from its config.json; no weights are read or allocated."""
    with needs("llm"):
        import transformers

    path = Path(folder) / "config.json"
    if not is_file(path):
        raise UserError(f"`model` {folder} holds no config.json; give the folder of the base model")
    _check_size(path)
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        name = (getattr(config, "architectures", None) or [""])[0]
        known = getattr(transformers, str(name), None)
        with torch.device("meta"):
            if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel):
                network = known._from_config(config)
            else:
                network = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a class of transformers may raise anything for settings that it was not written for
        raise UserError(f"{path} does not describe a model that can be built ({type(error).__name__})") from error
    return [(name, tuple(parameter.shape)) for name, parameter in network.named_parameters()]


def _check_size(path: Path) -> None:
    """Refuse thousands of layers: the model is built without memory for weights, but its modules are made one by one."""
    try:
        settings = parse_json(read_capped(path, MAX_CONFIG_BYTES, "settings of the base model"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON") from error
    for name, value in _numbers(settings):
        most = MOST_LAYERS if "layer" in name else MOST_LABELS if name == "num_labels" else value
        if value > most:
            raise UserError(f"{path}: {name} is more than {most:,}")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers in a tree, each with its key."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(part, key)
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part, name)
    elif type(value) is int:
        yield name, value
