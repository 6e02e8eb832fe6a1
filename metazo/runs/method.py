"""Builds the optimizer from the settings: tensors, method, hyperparameters and block scale."""

from __future__ import annotations

import os
import typing
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from metazo import zoo
from metazo.blocks import every_tensor, partition
from metazo.errors import UserError
from metazo.io.files import expanded
from metazo.io.plain import shown
from metazo.io.processes import launched
from metazo.models.embedded import EMBEDDED
from metazo.optimizers import METHODS
from metazo.optimizers.registry import method, require_own
from metazo.runs.config import FinetuneConfig
from metazo.runs.tuner_choice import tuner_of
from metazo.settings import MOST, check_flag, check_number
from metazo.step.rules import named_rule
from metazo.step.scales import STATISTICS_EVERY, BlockScale, RMSScale
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale, tuner_scale


def _option(name: str, key: str, value: Any) -> Any:
    """A hyperparameter's value, converted if it is a number or a flag. Raises UserError for what is neither."""
    wanted = METHODS[name].hint(key)
    check_flag(key, value, wanted)
    if not set(typing.get_args(wanted) or (wanted,)) <= {int, float, bool, type(None)}:
        return value
    try:
        value = TypeAdapter(wanted).validate_python(value)
    except ValidationError as error:
        raise UserError(f"`{key}` is {shown(value)}: {error.errors()[0]['msg']}.") from error
    if isinstance(value, int | float):
        check_number(key, value, most=MOST if isinstance(value, int) else None)
    return value


def block_scale(config: FinetuneConfig, model: nn.Module) -> BlockScale | None:
    """The block scale that the settings ask for."""
    every = config.statistics_every
    if config.scale == "rms":
        return RMSScale(every=every or STATISTICS_EVERY)
    if config.tuner is None:
        return None
    if config.tuner.startswith("random:"):
        blocks = partition(every_tensor(model))
        networks = PertNN(len(blocks), seed=_seed(config.tuner))
        return TunerScale(pertnn=networks, networks=[b.name for b in blocks], every=every or STATISTICS_EVERY)
    tuner = tuner_of(config, model, zoo.load)
    batch = config.batch_size * config.accumulate
    partial = config.allow_partial
    return tuner_scale(tuner, model.named_parameters(), allow_partial=partial, every=every, batch_size=batch)


def _seed(spec: str) -> int:
    try:
        seed = int(spec.removeprefix("random:"))
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**64:
        raise UserError(f"`tuner` {shown(spec)}: random: is followed by a whole number, its seed, from 0 to 2**64 - 1.")
    return seed


def arguments(config: FinetuneConfig, model: nn.Module) -> dict[str, Any]:
    """The keyword arguments of the method's constructor. Raises UserError for settings that it does not take."""
    name, cls = config.optimizer, method(config.optimizer)
    chosen = cls.translate(config.method)
    require_own(name, chosen, METHODS)
    chosen = {key: _option(name, key, value) for key, value in chosen.items()}
    for key, parameter in cls.hyperparameters().items():
        if (
            key not in chosen
            and parameter.default is parameter.empty
            and parameter.kind is not parameter.VAR_POSITIONAL
        ):
            code = cls.__init__.__code__
            where = f"in line {code.co_firstlineno} of {Path(code.co_filename).name}"
            raise UserError(
                f"`{key}` is missing: the constructor of {name}, {where}, has no default for it; give the setting, or add "
                "a default there."
            )
    settings: dict[str, Any] = {"weight_decay": config.weight_decay}
    if config.lr is not None:
        settings["lr"] = config.lr
    if "scale" not in cls.common and (config.scale != "none" or (config.tuner and "tuner" not in cls.common)):
        raise UserError(f"`optimizer` {name} has no perturbation that `tuner` or `scale` could shape.")
    if config.rule != "method":
        if cls.own_rule:
            raise UserError(f"`rule` {config.rule} under `optimizer` {name}, which {cls.own_rule}.")
        settings["rule"] = named_rule(config.rule)
    if cls.needs_tuner and config.tuner is None and config.scale == "none":
        free = "`optimizer='mezo'` with `scale='rms'`" if "scale" in cls.common else "`optimizer='skip-feedback'`"
        raise UserError(f"`optimizer` {name} needs `tuner` (or use {free}, which needs none).")
    shared: dict[str, Any] = {"eps": config.eps, "seed": config.seed, "precision": config.precision}
    shared["probe_ranks"] = config.probe_ranks
    if "scale" in cls.common:
        shared["scale"] = block_scale(config, model)
    if "tuner" in cls.common:
        shared["tuner"] = tuner_of(config, model, zoo.load_feedback)
    shared |= {key: value for key in ("noise", "probing") if (value := getattr(config, key)) != "method"}
    if cls.needs_model:
        settings["model"] = model
    return settings | {key: value for key, value in shared.items() if key in cls.common} | chosen


def unversioned(model: str) -> str:
    """Why a model has no revisions, in words; empty if it has."""
    if model in EMBEDDED:
        return f"for the embedded model {model}"
    return f"for the folder {model}" if expanded(model).is_dir() else ""


def unused(config: FinetuneConfig) -> list[str]:
    """A sentence about each setting that was given and changes nothing with the others."""
    cls, usual = method(config.optimizer), FinetuneConfig.__dataclass_fields__
    common = [name for name in ("eps", "noise", "probing", "precision") if name not in cls.common]
    alone = {
        "statistics_every": (config.scale == "none" and config.tuner is None, "without `scale` or `tuner`"),
        "allow_partial": (config.tuner is None, "without `tuner`"),
        "zoo": (config.tuner is None, "without `tuner`"),
        "merge": (not config.adapters, "without adapters"),
        "probe_ranks": (launched() == 1, "in one process"),
        "device_map": (not torch.accelerator.is_available(), "without a GPU"),
        "revision": (bool(why := unversioned(config.model)), why),
    }
    reasons = dict.fromkeys(common, f"with `optimizer` {config.optimizer}")
    reasons |= {name: why for name, (idle, why) in alone.items() if idle}
    return [
        f"`{name}` changes nothing {why}."
        for name, why in reasons.items()
        if getattr(config, name) != usual[name].default
    ]


def build_optimizer(config: FinetuneConfig, model: nn.Module) -> Any:
    """The optimizer of a run. Raises UserError for an unknown method or hyperparameter."""
    settings = arguments(config, model)
    if "check_loss" in method(config.optimizer).common:
        settings["check_loss"] = False  # the loop's own losses are not random
    return method(config.optimizer)(model.named_parameters(), **settings)


def resolve_device(name: str) -> torch.device:
    """The device that a setting names; under torchrun, each process of a machine has a GPU of its own.

    Raises UserError if it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and launched() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device makes tensors that have no numbers
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"`device` {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"`device` {name!r} cannot be used: it has no float64, in which metazo computes noise and sums; choose cpu or cuda."
        ) from error
    return device
