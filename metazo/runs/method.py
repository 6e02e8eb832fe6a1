"""From settings to an optimizer: which tensors, which method with which hyperparameters, which block scale."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from metazo import zoo
from metazo.blocks import NamedTensor, partition, tensor_id
from metazo.errors import UserError
from metazo.optimizers import OPTIMIZERS, ZOFinetuner, ZOOptimizer, tuner_scale
from metazo.optimizers.first_order import RULES as FIRST_ORDER
from metazo.optimizers.first_order import FirstOrder
from metazo.runs.config import FinetuneConfig
from metazo.step.rules import RULES
from metazo.step.scales import STATISTICS_EVERY, BlockScale, RMSScale
from metazo.tuner.file import Tuner
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale

COMMON = set(inspect.signature(ZOOptimizer.__init__).parameters)
# Methods that are a rule themselves: another on top would replace or double it.
OWN_RULE = {
    "mezo-momentum": "is MeZO with a rule already; use `optimizer='mezo'` with `rule`",
    "mezo-adam": "is MeZO with a rule already; use `optimizer='mezo'` with `rule`",
    "lozo-m": "keeps its momentum as a factor; use `optimizer='lozo'` with `rule`",
}


def methods() -> list[str]:
    return [*OPTIMIZERS, *FIRST_ORDER]


def hyperparameters(name: str) -> dict[str, inspect.Parameter]:
    """A method's own hyperparameters: what its class takes beyond what all take."""
    if name not in OPTIMIZERS:
        return {}
    found: dict[str, inspect.Parameter] = {}
    for cls in reversed(OPTIMIZERS[name].__mro__):
        if issubclass(cls, ZOOptimizer):
            found |= inspect.signature(cls.__init__).parameters
    return {
        key: parameter
        for key, parameter in found.items()
        if key not in COMMON and parameter.kind is not parameter.VAR_KEYWORD
    }


def block_scale(config: FinetuneConfig, model: nn.Module) -> BlockScale | None:
    """The block scale that the settings ask for."""
    every = config.statistics_every
    if config.scale == "rms":
        return RMSScale(every=every or STATISTICS_EVERY)
    if config.tuner is None:
        return None
    if config.tuner.startswith("random:"):
        blocks = partition(_every_tensor(model))
        networks = PertNN(len(blocks), seed=_seed(config.tuner))
        return TunerScale(pertnn=networks, networks=[b.name for b in blocks], every=every or STATISTICS_EVERY)
    tuner = _tuner(config, model)
    batch = config.batch_size * config.accumulate
    partial = config.allow_partial
    return tuner_scale(tuner, model.named_parameters(), allow_partial=partial, every=every, batch_size=batch)


def _tuner(config: FinetuneConfig, model: nn.Module) -> Tuner:
    """The tuner that `tuner` names; "auto" takes the first in the zoo that was made for a model of these shapes."""
    if config.tuner != "auto":
        return zoo.load(str(config.tuner), config.zoo, report=lambda text: None)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    found = [tuner for tuner in zoo.find(shapes, zoo=config.zoo) if tuner.why != "base model"]
    if not found:
        raise UserError("`tuner='auto'` found none for this model's tensors; metazo zoo list shows what there is.")
    return Tuner.load(found[0].path)


def _every_tensor(model: nn.Module) -> list[NamedTensor]:
    return [NamedTensor(name, parameter, tensor_id(name)) for name, parameter in model.named_parameters()]


def _seed(spec: str) -> int:
    try:
        return int(spec.removeprefix("random:"))
    except ValueError:
        raise UserError(f"`tuner` {spec!r}: random: is followed by a whole number, its seed.") from None


def build_optimizer(config: FinetuneConfig, model: nn.Module) -> ZOOptimizer | FirstOrder:
    """The optimizer of a run. Raises UserError for a method or hyperparameter that is not there."""
    name = config.optimizer
    if name not in methods():
        raise UserError(f"`optimizer` {name!r} is unknown; choose one of {', '.join(methods())}.")
    own = hyperparameters(name)
    for key in config.method:
        if key not in own:
            homes = [other for other in OPTIMIZERS if key in hyperparameters(other)]
            where = f"it belongs to {', '.join(homes)}" if homes else f"{name} has {', '.join(own) or 'none'}"
            raise UserError(f"`{key}` is not a hyperparameter of {name}; {where}.")
    settings: dict[str, Any] = {"weight_decay": config.weight_decay}
    if config.lr is not None:
        settings["lr"] = config.lr
    if name in FIRST_ORDER:
        if config.tuner or config.scale != "none":
            raise UserError(f"`optimizer` {name} has no perturbation that `tuner` or `scale` could shape.")
        return FirstOrder(name, model.named_parameters(), **settings)
    scale = block_scale(config, model)
    if scale is None and OPTIMIZERS[name] is ZOFinetuner:
        raise UserError("`optimizer` zo-finetuner needs `tuner` (or use `optimizer='mezo'` with `scale='rms'`).")
    if config.rule != "method" and name in OWN_RULE:
        raise UserError(f"`rule` {config.rule} under `optimizer` {name}, which {OWN_RULE[name]}.")
    parts: dict[str, Any] = {} if config.rule == "method" else {"rule": RULES[config.rule]()}
    if config.noise != "method":
        parts["noise"] = config.noise
    return OPTIMIZERS[name](
        model.named_parameters(),
        eps=config.eps,
        seed=config.seed,
        scale=scale,
        precision=config.precision,
        **settings,
        **parts,
        **config.method,
    )


def resolve_device(name: str) -> torch.device:
    """The device that a setting names. Raises UserError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"`device` {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
