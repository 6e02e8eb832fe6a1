"""Which tuner a run takes: the one that is named, the one that `tuner='auto'` finds, or that with which it began."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from metazo import zoo
from metazo.errors import UserError
from metazo.feedback.tuner import describe
from metazo.models.assemble import base_of
from metazo.models.embedded import EMBEDDED
from metazo.models.identity import BASE, block_weights
from metazo.optimizers.registry import method
from metazo.runs.config import FinetuneConfig
from metazo.runs.locate import log_to_continue
from metazo.runs.tuner_record import began_with
from metazo.steplog.format import scan
from metazo.tuner.file import Tuner
from metazo.tuner.match import NamedShapes


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
    of its adapters, by the hash of its weights or else by its name, comes before those of others with the same names and
    shapes. A run that goes on takes the tuner with which it began, by its hash in the log. Raises UserError if none fits, or
    if that one is gone."""
    if "tuner" in method(config.optimizer).common:
        blocks = describe(model, "").fingerprint
        found = [tuner for tuner in zoo.tuners(config.zoo, "feedback") if tuner.entry.fingerprint == blocks]
        what = "feedback for this model's blocks; fit it with metazo meta-train --learn feedback."
    else:
        shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        found = [tuner for tuner in zoo.find(shapes, zoo=config.zoo) if tuner.why != "base model"]
        found.sort(key=lambda tuner: tuner.where != "zoo")  # a match by shapes elsewhere is no reason to leave it
        what = "tuner for this model's tensors; metazo zoo list shows all tuners, and metazo zoo verify those that are damaged."
        if not found and (partial := _partial(shapes, config)):
            found = partial if config.allow_partial else []
            what = (
                f"tuner for all of this model's tensors; {partial[0].entry.name} has networks for some of them: with "
                "`allow_partial=True` it is taken, and the others run at RMS scale."
            )
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
    return _closest(found, _names(config, model), model)


def _partial(shapes: NamedShapes, config: FinetuneConfig) -> list[zoo.Found]:
    """The tuners with networks for the most blocks of a model that none fits, as below another head or vocabulary."""
    counted = []
    for tuner in zoo.tuners(config.zoo):
        with suppress(UserError):  # a damaged one, perhaps of another model
            counted.append((len(Tuner.load(tuner.path).fits(shapes).matched) if tuner.path.is_file() else 0, tuner))
    most = max((count for count, _ in counted), default=0)
    return [replace(tuner, why="part") for count, tuner in counted if count == most > 0]


def _closest(found: Sequence[zoo.Found], names: set[str], model: nn.Module) -> zoo.Found:
    """Of tuners that all fit, the last one that was made for this model: for its weights, or as far as no hash can be compared,
    for one of these names. Models of other weights are often called the same, such as `checkpoint-500`."""
    bases = _by_base(found)
    if len(bases) == 1:
        return zoo.latest(found)
    weights = _hash(block_weights(model)) if any(known for _, known in bases) else None
    if weights and (
        same := sorted((base for base in bases if base[1] == weights), key=lambda base: base[0] not in names)
    ):
        return zoo.latest(bases[same[0]])
    other = [known for _, known in bases if weights and known and known[0] == weights[0]]
    named = [base for base in bases if base[0] in names and base[1] not in other]
    group = [tuner for base in named or list(bases)[:1] for tuner in bases[base]]
    taken = zoo.latest([tuner for tuner in found if tuner in group])  # in the order of the index
    others = [zoo.latest(bases[base]).entry.name for base in named or bases if taken not in bases[base]]
    if others:
        warnings.warn(
            f"`tuner='auto'` takes {taken.entry.name}, and {', '.join(others)} fit as well: name the tuner of the model from "
            "which this one was derived.",
            stacklevel=3,
        )
    return taken


def _by_base(found: Sequence[zoo.Found]) -> dict[tuple[str, Any], list[zoo.Found]]:
    """Tuners by name and hash of their base model. One without a hash, of an earlier version of metazo, is of the one model of
    its name, if there is one alone."""
    hashes: dict[str, dict[Any, list[zoo.Found]]] = {}
    for tuner in found:
        hashes.setdefault(tuner.entry.base_model, {}).setdefault(_hash(_weights_then(tuner)), []).append(tuner)
    bases = {}
    for name, held in hashes.items():
        if len(held) == 2 and None in held:
            known = next(known for known in held if known)
            held = {known: [tuner for tuner in found if tuner.entry.base_model == name]}
        bases |= {(name, known): tuners for known, tuners in held.items()}
    return bases


def _hash(weights: Any) -> Any:
    """The facts of `block_weights` as a tuple; None for anything else."""
    facts = weights if isinstance(weights, dict) else {}
    found = facts.get("dtype"), facts.get("sha256")
    return found if all(isinstance(fact, str) for fact in found) else None


def _weights_then(tuner: zoo.Found) -> Any:
    """What a tuner's file says of the weights of its base model; None if it says nothing, or is not here or damaged."""
    with suppress(UserError):
        return _opened(tuner).info.recipe.get(BASE) if tuner.path.is_file() else None


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
