"""The method of a Trainer: from `optimizer_cls_and_kwargs` and TrainingArguments to the optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from metazo import zoo
from metazo.errors import UserError
from metazo.io.plain import shown
from metazo.optimizers.base import ZOOptimizer
from metazo.optimizers.registry import METHODS, load
from metazo.tuner.scale import tuner_scale


def chosen(given: Any) -> tuple[type[ZOOptimizer], dict[str, Any]]:
    """The class and the settings that `optimizer_cls_and_kwargs` names; None for no settings. Raises UserError for others."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise UserError(
            f"`optimizer_cls_and_kwargs` is {shown(given)}: give a method and its settings, such as "
            '("mezo", {"eps": 1e-3}).'
        )
    name, settings = given
    load()
    cls = METHODS.get(name) if isinstance(name, str) else name
    if not (isinstance(cls, type) and issubclass(cls, ZOOptimizer)):
        taken = {
            key: each for key, each in METHODS.items() if issubclass(each, ZOOptimizer) and not each.wants_full_closure
        }
        zeroth = [key for key, each in taken.items() if not each.needs_gradient]
        what, names = ("method", taken) if cls is None else ("zeroth-order method", zeroth)
        raise UserError(
            f"`optimizer_cls_and_kwargs` names {shown(name)}, which is not a {what}: choose {', '.join(names)}."
        )
    if not isinstance(settings, Mapping | None):
        raise UserError(
            f'`optimizer_cls_and_kwargs` has the settings {shown(settings)}: give a mapping, such as {{"eps": 1e-3}}.'
        )
    return cls, dict(settings or {})


def is_given(settings: Any, name: str) -> bool:
    """Whether a field of TrainingArguments has another value than its default."""
    value, default = getattr(settings, name, None), type(settings).__dataclass_fields__[name].default
    return str(getattr(value, "value", value)) != str(getattr(default, "value", default))


def moments(cls: type[ZOOptimizer], settings: Any) -> dict[str, Any]:
    """The settings of Adam's moments that were given, for a method that has such moments."""
    known = cls.hyperparameters()
    found: dict[str, Any] = {}
    if "betas" in known and (is_given(settings, "adam_beta1") or is_given(settings, "adam_beta2")):
        found["betas"] = (settings.adam_beta1, settings.adam_beta2)
    if "betas" in known and is_given(settings, "adam_epsilon"):
        found["stability"] = settings.adam_epsilon
    return found


def build(
    cls: type[ZOOptimizer],
    module: nn.Module,
    own: Mapping[str, nn.Parameter],
    options: dict[str, Any],
    decayed: set[str],
    examples: int,
    rates: Mapping[str, float] | None = None,
) -> ZOOptimizer:
    """The method with its settings. own: parameters beside the model's; weight decay is for those named `decayed`, as in the
    Trainer. examples: of a step, over all micro-batches and processes. rates: learning rates by name, where they differ.
    """
    parameters: Iterable = [*module.named_parameters(), *own.items()]
    name = options.pop("tuner", None)
    if "tuner" in cls.common and name is not None:  # feedback, which the method also takes as an object
        options["tuner"] = zoo.load_feedback(name, report=lambda text: None) if isinstance(name, str | Path) else name
    elif name is not None:
        tuner = zoo.load(name, report=lambda text: None)
        options["scale"] = tuner_scale(tuner, parameters, batch_size=examples)
    if cls.needs_tuner and not options.keys() & {"scale", "tuner"}:
        raise UserError(
            f"{cls.name} needs a tuner: add `tuner`, a file, a name of the zoo or a Hub id, to its settings."
        )
    if cls.wants_full_closure:
        raise UserError(
            f"{cls.name} needs the loss over all training examples, which a Trainer does not give: make the optimizer, set its "
            "`full_closure`, and give it as `optimizers=(optimizer, scheduler)`."
        )
    if cls.needs_model:
        if own:
            raise UserError(
                f"{cls.name} trains a model alone, and the loss has parameters of its own, such as {next(iter(own))}: freeze "
                "them (requires_grad_(False)), or choose another method."
            )
        options["model"] = module
    known: Iterable[str] = {"lr", "weight_decay", "model", *cls.common, *cls.hyperparameters()}
    for name in options:
        if name not in known:
            raise UserError(f"`{name}` is not a setting of {cls.name}, which has {', '.join(sorted(known))}.")
    if options["weight_decay"] or rates:
        groups: dict[tuple[float | None, bool], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in sorted(parameters, key=lambda pair: pair[0] not in decayed):
            key = (rates or {}).get(name, options["lr"]), name in decayed
            groups.setdefault(key, []).append((name, parameter))
        parameters = [
            {"params": pairs, "lr": lr, "weight_decay": options["weight_decay"] if decays else 0.0}
            for (lr, decays), pairs in groups.items()
        ]
    return cls(parameters, **options)


def rates_by_name(patterns: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
    """The learning rates of `learning_rate_mapping`, of sentence-transformers, by the method's names; a later pattern wins.

    names: of each trained parameter, the name that a pattern is searched in. Raises UserError for a pattern without a match.
    """
    found: dict[str, float] = {}
    for pattern, rate in patterns.items():
        try:
            matched = [name for name, seen in names.items() if re.search(pattern, seen)]
        except re.error as error:
            raise UserError(
                f"`learning_rate_mapping` has {pattern!r}, which is no regular expression ({error})."
            ) from None
        if not matched:
            raise UserError(
                f"`learning_rate_mapping` has {pattern!r}, which no trained parameter's name matches; one is "
                f"{next(iter(names.values()), None)}."
            )
        found |= dict.fromkeys(matched, float(rate))
    return found
