"""Settings that no run can have, found before a model is loaded; a dry run refuses them as a run does."""

from __future__ import annotations

from typing import Any

from metazo.errors import UserError
from metazo.io.processes import rank, world
from metazo.io.tensorfile import check_dense, check_plain
from metazo.models.adapters import PEFT_TYPES
from metazo.models.assemble import has_adapters
from metazo.models.compressed import rounds
from metazo.models.load import DTYPES, LoadedModel
from metazo.models.quantize import quantization, repeated
from metazo.models.sentence import SentenceClassifier
from metazo.optimizers.ranks import share
from metazo.optimizers.registry import method
from metazo.runs.batches import check_shares
from metazo.runs.choose import check_open
from metazo.runs.config import AUTO, FinetuneConfig
from metazo.runs.method import resolve_device
from metazo.runs.track import check as check_trackers
from metazo.runs.tuned import Given
from metazo.tasks import resolve
from metazo.tasks.objectives import Objective, find, look
from metazo.tuner.hub import check_card, check_repository


def check_settings(config: FinetuneConfig, given: Given | None = None, execute: bool = True) -> Objective | None:
    """Raises UserError for settings that no run can have. Returns what is minimised in place of the task's loss, or None
    without `execute`, which imports no code.

    given: objects in memory, which replace those that the settings name.
    """
    given = given or Given()
    if config.optimizer == AUTO:
        check_open(config)
    _check_processes(config, given)
    if config.quantize is not None and given.loaded is None:
        _check_quantised(config)
    if given.loaded is not None and config.out is not None and config.keep != "none":
        _check_repeated(config, given.loaded)
    if config.track:
        check_trackers(config.track)
    if config.push is not None:
        check_repository(config.push)
        if rank() == 0:
            check_card(config.push)
    return _objective(config, given, execute)


def check_saved(config: FinetuneConfig, loaded: LoadedModel) -> None:
    """Raises UserError for adapters that could not be saved at the end."""
    plain = config.merge or config.keep == "none"
    if not plain and config.out is not None:
        check_named(config, loaded)
    for adapter in getattr(loaded.model, "peft_config", {}).values():
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        if kind not in PEFT_TYPES and not plain and config.out is not None:
            raise UserError(
                f"`model` has adapters of the kind {kind}, which metazo trains and cannot load again: leave out `out`, or add "
                "`keep='none'`, and save them yourself by save_pretrained."
            )
    if isinstance(loaded.model, SentenceClassifier) and config.adapters and not plain:
        raise UserError("`adapter` on a sentence encoder can only be saved merged into its weights; add `merge=True`.")


def check_gradient(config: FinetuneConfig, loaded: LoadedModel, optimizer: Any = None) -> None:
    """Raises UserError for a method that needs a gradient on a model that passes none. optimizer: in memory."""
    used = optimizer or (method(config.optimizer) if config.optimizer != AUTO else None)
    if used is not None and used.needs_gradient and rounds(loaded.model):
        raise UserError(
            f"`optimizer` {config.optimizer} needs the gradient of the loss, and {loaded.name} was saved by compressed-tensors "
            "with layers that round as they compute, which no gradient passes; choose a method that probes, such as mezo."
        )


def check_named(config: FinetuneConfig, loaded: LoadedModel) -> None:
    """Raises UserError for new adapters on a model of adapters: the sum that they belong to is in no folder that they could
    name, and on either part alone peft would read another model.
    """
    new = config.adapters is not None and config.adapters.kind != "continue"
    if new and has_adapters(loaded.name, config.revision):
        raise UserError(
            f"`model` {loaded.name} has adapters, and new ones on it could not name their base model: continue these with "
            "`adapter='continue'`, or add `merge=True` to save a plain model."
        )


def _check_quantised(config: FinetuneConfig) -> None:
    if config.adapters is None:
        raise UserError(
            f"`quantize` {config.quantize} leaves weights that cannot be trained; train adapters in full precision with "
            "`adapter='lora'`."
        )
    check_merge(config)
    quantization(str(config.quantize), DTYPES[config.dtype], resolve_device(config.device))


def _check_repeated(config: FinetuneConfig, loaded: LoadedModel) -> None:
    """Raises UserError for a base in memory on which its adapters could not be loaded, and for what no file can hold."""
    remedy = "leave out `out`, or add `keep='none'`, and save the model yourself"
    if loaded.kind == "own":
        return check_plain(loaded.model.state_dict(), remedy)
    base: Any = getattr(loaded.model, "get_base_model", lambda: loaded.model)()
    adapted = config.adapters is not None or base is not loaded.model
    if not adapted or config.merge:
        check_dense(loaded.model.state_dict(), remedy)
    if adapted and loaded.quantize is None and repeated(base, loaded.dtype)[0]:
        raise UserError(
            "`model` was quantised in a way that metazo does not repeat, so it could not load the adapters on this base: "
            "save the quantised model by save_pretrained and give its folder, or load it with metazo.load_model(quantize=...)."
        )


def check_merge(config: FinetuneConfig) -> None:
    """Raises UserError for adapters that are to be merged into quantised weights."""
    if config.merge and config.quantize is not None:
        raise UserError(
            f"`merge` would round the sum of `quantize` {config.quantize} weights and adapters to whole numbers; leave it out."
        )


def _check_processes(config: FinetuneConfig, given: Given) -> None:
    """Raises UserError for a run that several processes cannot share."""
    if world() == 1:
        return
    if config.tensor_parallel * config.fsdp > 1:
        _check_divided(config, given)
    if config.optimizer == AUTO:
        raise UserError("`optimizer` is auto, which chooses for one process; under torchrun, name a method.")
    if not (given.optimizer or method(config.optimizer)).replayable:
        raise UserError(
            f"`optimizer` {config.optimizer} runs in one process, because processes exchange losses alone: start it without "
            "torchrun, or choose another."
        )
    ranks = config.probe_ranks if given.optimizer is None else given.optimizer.exchange.probe_ranks
    check_shares(config, given.own is not None, share(ranks * config.tensor_parallel)[1])


def _check_divided(config: FinetuneConfig, given: Given) -> None:
    """Raises UserError for settings that a model in parts cannot have."""
    settings = ("tensor_parallel", "fsdp")
    named = " and ".join(f"`{name}`" for name in settings if getattr(config, name) > 1)
    if given.loaded is not None or given.optimizer is not None:
        raise UserError(f"{named} divide a model when it is loaded: give its name, and the method's, not objects.")
    unfit: dict[str, object] = {
        "adapter": config.adapters,
        "quantize": config.quantize,
        "device_map": config.device_map,
        "snapshot_every": config.snapshot_every,
    }
    for name, value in unfit.items():
        if value:
            raise UserError(f"`{name}` cannot be used together with {named}; leave one of them out.")


def _objective(config: FinetuneConfig, given: Given, execute: bool) -> Objective | None:
    """What is minimised in place of the task's loss. Raises UserError if there is none of this name, or if the method needs
    a gradient.
    """
    if config.objective is None:
        return None
    used = given.optimizer or (method(config.optimizer) if config.optimizer != AUTO else None)
    if used is not None and used.needs_gradient:
        raise UserError(
            f"`optimizer` {config.optimizer} needs the gradient of the loss, and `objective` {config.objective} is only "
            "evaluated; choose a method that probes, such as mezo."
        )
    name, kind = given.objective or config.objective, (given.task or resolve(config.task)).kind
    if not isinstance(name, str) or ":" not in name:
        return find(name, kind)
    if given.unnamed:
        raise UserError(
            f"The run in {config.out} minimises the function {name}, and metazo executes code only if you name it yourself, "
            "because the folder of a run may come from anybody: look at the file, and add `objective` PATH:FUNCTION, where "
            "PATH is the file's place from here."
        )
    if execute:
        return find(name, kind)
    if not config.resume:  # of a resumed run the file may be elsewhere
        look(name)
    return None
