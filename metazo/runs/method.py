"""Builds the optimizer from the settings: tensors, method, hyperparameters and block scale."""

from __future__ import annotations

import os
import typing
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from metazo import zoo
from metazo.blocks import every_tensor, partition
from metazo.errors import UserError
from metazo.feedback.tuner import describe
from metazo.io.files import expanded
from metazo.io.plain import shown
from metazo.io.processes import launched
from metazo.models.assemble import base_of
from metazo.models.embedded import EMBEDDED
from metazo.optimizers import METHODS
from metazo.optimizers.registry import method, require_own
from metazo.runs.config import FinetuneConfig
from metazo.runs.locate import log_to_continue
from metazo.runs.tuner_record import began_with
from metazo.settings import MOST, check_flag, check_number
from metazo.step.rules import named_rule
from metazo.step.scales import STATISTICS_EVERY, BlockScale, RMSScale
from metazo.steplog.format import scan
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


def tuner_of(config: FinetuneConfig, model: nn.Module, load: Callable[..., Any]) -> Any:
    """What `tuner` names, read by `load`, or what `auto_tuner` finds: a Tuner, or feedback, whichever the method takes. A run
    that goes on keeps its tuner, by the hash in its log, if it is in a zoo folder or the cache under that name, whatever the
    name means now."""
    if config.tuner == "auto":
        return _opened(auto_tuner(config, model))
    name, log = str(config.tuner), log_to_continue(config)
    if log is not None:
        known = zoo.tuners(config.zoo, "feedback" if "tuner" in method(config.optimizer).common else "tuner")
        named = [
            each
            for each in known
            if name in (each.entry.name, each.entry.name.rpartition("/")[0], each.entry.base_model)
        ]
        if (then := of_log(scan(log).header, named)[0]) is not None:
            return _opened(then)
    return load(name, config.zoo, report=lambda text: None)


def auto_tuner(config: FinetuneConfig, model: nn.Module) -> zoo.Found:
    """What `tuner='auto'` takes: the first tuner that fits, of the kind of the method, in its last version. The zoo that `zoo`
    names comes first, then the user's own, the bundled one and the cache; in each, a tuner of this very model or of the base
    of its adapters comes before those of others with the same names and shapes. A run that goes on takes the tuner with which
    it began, by its hash in the log. Raises UserError if none fits, or if that one is gone."""
    if "tuner" in method(config.optimizer).common:
        blocks = describe(model, "").fingerprint
        found = [tuner for tuner in zoo.tuners(config.zoo, "feedback") if tuner.entry.fingerprint == blocks]
        what = "feedback for this model's blocks; fit it with metazo meta-train --learn feedback."
    else:
        shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        found = [tuner for tuner in zoo.find(shapes, zoo=config.zoo) if tuner.why != "base model"]
        found.sort(key=lambda tuner: tuner.where != "zoo")  # a match by shapes elsewhere is no reason to leave it
        what = "tuner for this model's tensors; metazo zoo list shows all tuners, and metazo zoo verify those that are damaged."
    if (log := log_to_continue(config)) is not None:
        then, refused = of_log(header := scan(log).header, found)
        if then is None:
            raise UserError(
                f"The tuner that `tuner='auto'` took when the run in {config.out} began, with the hash {header.get('tuner')}, "
                f"was not found in the zoo folders{refused}; publish it there again, or name the folder that has it as `zoo`."
            )
        return then
    if not found:
        raise UserError(f"`tuner='auto'` found no {what}")

    found = [tuner for tuner in found if (tuner.why, tuner.folder) == (found[0].why, found[0].folder)]
    if found[0].why == "names":
        warnings.warn(
            "`tuner='auto'` takes a tuner whose file has no shapes: it is for a model with the same names of tensors, and may "
            "be for one of another size. Name the tuner if it is of this model.",
            stacklevel=2,
        )
    own = [tuner for tuner in found if tuner.entry.base_model in _names(config, model)]
    bases = {(own or found)[0].entry.base_model: None} | {tuner.entry.base_model: None for tuner in found}
    taken = next(iter(bases))
    if not own and len(bases) > 1:
        warnings.warn(
            f"`tuner='auto'` takes the one for {taken}, and those for {', '.join(list(bases)[1:])} fit as well: "
            "name the tuner of the model from which this one was derived.",
            stacklevel=2,
        )
    return zoo.latest([tuner for tuner in found if tuner.entry.base_model == taken])


def _names(config: FinetuneConfig, model: nn.Module) -> set[str]:
    """What a zoo may call a model: the name or folder that was given, or the base of its adapters."""
    name = config.model
    if name.startswith("memory:"):
        source = getattr(getattr(model, "config", None), "_name_or_path", "")
        name = next((name for name, folder in EMBEDDED.items() if str(folder) == source), source)
    return {name := base_of(name, config.revision)[0], zoo.zoo_base(name)} if name else set()


def of_log(header: dict[str, Any], known: Iterable[zoo.Found]) -> tuple[zoo.Found | None, str]:
    """Which of these tuners is the one of the run with this header; if none is, why one of them was refused, in brackets."""
    refused = ""
    for found in known:
        try:
            if began_with(header, _opened(found)):
                return found, ""
        except UserError as error:  # a damaged one, perhaps of another model
            refused = f" (one there was refused: {error})"
    return None, refused


def _opened(found: zoo.Found) -> Any:
    return zoo.opened(found, report=lambda text: None)


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
