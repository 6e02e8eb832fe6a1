"""`metazo.finetune`: objects or names in, the tuned model out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from inspect import signature
from numbers import Integral
from pathlib import Path
from typing import Any

import rich.console
from torch import nn

from metazo.errors import UserError
from metazo.io.plain import shown
from metazo.io.terminal import Console
from metazo.models.assemble import as_loaded
from metazo.models.load import DTYPES, LoadedModel
from metazo.optimizers.registry import METHODS, Method, register
from metazo.optimizers.registry import load as load_methods
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import tune
from metazo.runs.method import resolve_device
from metazo.runs.own import Loss, OwnLoss, own_batches, training_batches
from metazo.runs.race import ROUND
from metazo.runs.race import race as run_race
from metazo.runs.tuned import MEMORY, AsGiven, Finetuned, Given
from metazo.settings import as_path, build, with_role
from metazo.step.record import Step
from metazo.tasks import TASKS, Task, in_memory, resolve
from metazo.tasks.objectives import AnswerBatch

# Settings of loading a model by its name.
OF_LOADING = ("kind", "head", "dtype", "quantize", "revision", "attn_implementation", "device_map")
# Settings of role "method" that the loop applies with every optimizer.
OF_THE_LOOP = {"optimizer", "schedule", "warmup"}


def finetune(
    model: str | Path | LoadedModel | nn.Module,
    task: str | Path | Task | None = None,
    optimizer: str | type | Any = "mezo",
    *,
    data: str | Path | Sequence[Any] | Mapping[str, Sequence[Any]] | Iterable[Any] | None = None,
    tokenizer: Any = None,
    loss: Loss | None = None,
    dev: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    out: str | Path | None = None,
    objective: str | Callable[[nn.Module, AnswerBatch], float] | None = None,
    race: Iterable[float | str] | None = None,
    race_steps: int | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_evaluation: Callable[[dict[str, Any]], None] | None = None,
    console: Console | None = None,
    **settings: Any,
) -> Finetuned:
    """Fine-tune a model by forward passes, on a task or on your own loss.

    Args:
        model: a folder or Hub id of transformers, the folder of a run, pico; or an object in memory, which is trained in
            place: a transformers model (with `tokenizer`), a `LoadedModel`, or with `loss` any nn.Module.
        task: by name, as a YAML file, or a `metazo.Task`.
        optimizer: a method by name, a class of metazo.optimizers or your own class (built from the settings), or an
            optimizer over the model's named parameters, which has its own hyperparameters.
        data: a folder with `<task>/<split>.jsonl` (not read for tasks that generate their rows); rows in memory: a list of
            dicts, a datasets.Dataset, or a mapping (DatasetDict) of train and, if there are any, validation and test; by
            default the task's own rows. With `loss`, the training batches: a list, a DataLoader (read once), or an endless
            iterable.
        loss: (model, batch) -> scalar tensor, the mean loss of a batch, computed without dropout or other randomness.
        dev, test: with `loss`, the batches that choose the kept weights, and the batches of the final test; iterables are read
            to their end.
        out: folder for everything that the command line writes, from which the run can be resumed and its log replayed;
            by default nothing is written. Settings and log name an object in memory as memory:...; to resume or to replay,
            give it again as it was before the first step.
        objective: what is minimised in place of the task's loss: 1 - a metric (accuracy, f1, exact-match, ...), "file.py:name",
            or a function (model, batch) -> number (`metazo.tasks.objectives`), for methods that need no gradient.
        race: learning rates, of which one is found over the first steps, instead of `lr` (`metazo.runs.race`).
        race_steps: steps of each of its rounds, at least 1, by default 12.
        on_step: called with the record of each step; on_evaluation: called with the record of each evaluation.
        console: shows plan, progress and warnings; by default nothing is shown.
        settings: fields of `metazo.runs.config.FinetuneConfig` (lr, eps, steps, batch_size, schedule, scale, keep,
            eval_every, max_loss, seed, resume, ...), and hyperparameters of the method by name (rank=2).

    Returns: Finetuned: model, tokenizer, summary, steps, losses, evaluations, out. The model is in eval mode and has the
    weights that `keep` selects: the best on dev (default), or the last.

    It needs the extra llm, with `loss` as well; the optimizers of metazo by themselves do not.

    Raises UserError for bad input, before anything is written or trained, and with a model in memory as it was given;
    Interrupted if a signal stops the run, with the run saved in `out`. A callback may raise anything: the steps so far are
    in the log.

        metazo.finetune("pico", "pico_sentiment", lr=1e-4, steps=100)
        metazo.finetune(model, task, "lozo", tokenizer=tokenizer, data=dataset, rank=2, lr=1e-6, steps=1000, out="runs/a")
        metazo.finetune(net, loss=lambda net, batch: cross_entropy(net(batch[0]), batch[1]), data=loader, lr=1e-3, steps=500)

    Every process of a script that torchrun started calls it with the same arguments; see docs/scale.md.

    Do not use it for a loss that is random; use an optimizer in your own loop instead.
    """
    for name, function in (("on_step", on_step), ("on_evaluation", on_evaluation)):
        if function is not None and not callable(function):
            raise UserError(f"`{name}` is {shown(function)}, and must be a function of one record.")
    if not isinstance(console, rich.console.Console | None):
        raise UserError(f"`console` is {shown(console)}, and must be a rich.console.Console.")
    held = model.model if isinstance(model, LoadedModel) else model
    before, given = AsGiven(held) if isinstance(held, nn.Module) else None, Given()
    try:
        config = _described(given, model, task, optimizer, data, tokenizer, loss, dev, test, out, objective, settings)
        if race is None and race_steps is not None:
            raise UserError("`race_steps` is the length of a round of `race`, which is not given; leave it out.")
        whole = isinstance(race_steps, Integral) and not isinstance(race_steps, bool)
        if race_steps is not None and not (whole and race_steps >= 1):
            raise UserError(
                f"`race_steps` is {shown(race_steps)} and must be the whole number of steps of a round; choose 1 or more."
            )
        if race is None:
            return tune(config, given, console, on_step=on_step, on_evaluation=on_evaluation)
        return run_race(
            config,
            race,
            ROUND if race_steps is None else int(race_steps),
            console=console,
            given=given,
            on_step=on_step,
            on_evaluation=on_evaluation,
        )
    except BaseException:
        if before is not None and not given.begun:
            before.restore()
        raise


def _described(
    given: Given, model, task, optimizer, data, tokenizer, loss, dev, test, out, objective, settings
) -> FinetuneConfig:
    """The settings of a call of `finetune`; its objects in memory are put into `given`."""
    values = _split(settings)
    values["out"] = None if out is None else as_path("out", out)
    if callable(objective):
        given.objective, values["objective"] = (
            objective,
            MEMORY + getattr(objective, "__name__", type(objective).__name__),
        )
    else:
        values["objective"] = objective
    if loss is not None:
        if objective is not None:
            raise UserError(
                "`objective` cannot be combined with `loss`, which is minimised itself; leave one of them out."
            )
        _own(given, values, model, task, data, tokenizer, loss, dev, test)
    else:
        if dev is not None or test is not None:
            raise UserError("`dev` and `test` are batches, which need `loss`; give rows of a task as `data`.")
        _model(given, values, model, tokenizer)
        _task(given, values, task, data)
    _optimizer(given, values, optimizer)
    return build(FinetuneConfig, values)


def _split(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run; all others are hyperparameters of the method, which checks them, and are put under "method"."""
    known = {item.name for item in fields(FinetuneConfig)}
    values = {name: value for name, value in settings.items() if name in known}
    own = {name: value for name, value in settings.items() if name not in known}
    method = values.get("method") or {}
    if not isinstance(method, Mapping):
        raise UserError(f"`method` holds hyperparameters by name, not {shown(method)}: name the method as `optimizer`.")
    return values | {"method": {**method, **own}}


def _own(given, values, model, task, data, tokenizer, loss, dev, test) -> None:
    """The objects of a run on a module with a loss and batches."""
    if not isinstance(model, nn.Module):
        raise UserError(f"`model` is {type(model).__name__} {str(model)[:80]!r}; with `loss` it must be an nn.Module.")
    _check_loss(loss)
    if task is not None or tokenizer is not None:
        raise UserError("`task` and `tokenizer` cannot be combined with `loss`, which replaces both; leave them out.")
    if name := next((name for name in ("lora", "adapter") if values.get(name)), None):
        raise UserError(f"`{name}` cannot be combined with `loss`: put adapters on the module yourself.")
    most = values["steps"] * values.get("accumulate", 1) if values.get("steps") else None
    train, dev, test = training_batches(data, most), own_batches("dev", dev), own_batches("test", test)
    if not train:
        raise UserError("`data` is missing: with `loss` it holds the training batches.")
    given.own = OwnLoss(loss, train, dev, test)
    given.loaded = as_loaded(model)
    sizes = dict(zip(("train_examples", "dev_examples", "test_examples"), map(len, (train, dev, test))))
    for name in (
        "batch_size",
        "batches",
        "eval_batch_size",
        "max_length",
        "k_per_class",
        "split_seed",
        *sizes,
        *OF_LOADING,
    ):
        if values.get(name) is not None:
            raise UserError(
                f"`{name}` cannot be combined with `loss`, which uses batches and model unchanged; leave it out."
            )
    values |= sizes | {"batch_size": 1, "eval_batch_size": 1, "task": given.own.task.name}
    values.setdefault("keep", "best" if dev else "last")
    _describe_model(values, given.loaded)


def _check_loss(loss: Any) -> None:
    """Raises UserError for what is no function of a model and a batch."""
    if not callable(loss):
        raise UserError(f"`loss` is {shown(loss)}, and must be a function: (model, batch) -> scalar tensor.")
    with suppress(ValueError):  # a function without a signature, such as one of C
        try:
            signature(loss).bind("model", "batch")
        except TypeError as error:
            raise UserError(f"`loss` is called as loss(model, batch), which it does not take: {error}.") from error


def _model(given: Given, values: dict[str, Any], model: Any, tokenizer: Any) -> None:
    """The model of a run on a task, by name or in memory."""
    if tokenizer is not None and isinstance(model, str | Path | LoadedModel):
        raise UserError("`tokenizer` needs a transformers model in memory; any other has its own. Leave it out.")
    if isinstance(model, str | Path):
        values["model"] = str(model)
        return
    if isinstance(model, LoadedModel):
        given.loaded = replace(model)  # LoRA adapters are put on this copy
    elif not isinstance(model, nn.Module):
        raise UserError(
            f"`model` is a folder, a Hub id, pico, a transformers model or a LoadedModel, not {shown(model)}."
        )
    elif tokenizer is None:
        raise UserError(
            "`tokenizer` is missing: give the one with which the model in memory was trained, or give a `loss`."
        )
    else:
        given.loaded = as_loaded(model, tokenizer)
    for name in OF_LOADING:
        if values.get(name) is not None:
            raise UserError(
                f"`{name}` cannot be combined with a model in memory, which is used unchanged; leave it out."
            )
    _describe_model(values, given.loaded)


def _describe_model(values: dict[str, Any], loaded: LoadedModel) -> None:
    """The settings that follow from a model in memory."""
    name = loaded.name if loaded.name.startswith(MEMORY) else MEMORY + type(loaded.model).__name__
    dtype = next(name for name, dtype in DTYPES.items() if dtype == loaded.dtype)
    away = [name for name, parameter in loaded.model.named_parameters() if parameter.device.type == "meta"]
    if away:
        raise UserError(
            f"`model` has {len(away)} tensors without numbers in memory, such as {away[0]} (device meta): accelerate offloads "
            "them, or they were never loaded. Give a model that is in memory as a whole, or train this one in your own loop, "
            "with metazo.integrations.local_parameters(model)."
        )
    device = values.get("device") or str(next(loaded.model.parameters()).device)
    values |= {"model": name, "dtype": dtype, "device": device}
    loaded.model.to(resolve_device(device))  # type: ignore[call-arg]


def _task(given: Given, values: dict[str, Any], task: Any, data: Any) -> None:
    """The task, by name, file or as an object, with rows in a folder or in memory."""
    task = str(task) if isinstance(task, Path) else task
    if isinstance(data, str | Path) or data is None:
        values["data"] = None if data is None else Path(data)
    else:
        if task is None:
            raise UserError(
                "`task` is missing: with rows as `data`, name a task that reads such rows, or describe them by a metazo.Task."
            )
        found = task if isinstance(task, Task) else resolve(task)
        given.task, given.rows = in_memory(found, data)
    if isinstance(task, Task) and TASKS.get(task.name) is not task:
        given.task = given.task or task
    values["task"] = MEMORY + given.task.name if given.task else task.name if isinstance(task, Task) else task


def _optimizer(given: Given, values: dict[str, Any], optimizer: Any) -> None:
    """The method, by name, as a class, or as an optimizer."""
    load_methods()
    if isinstance(optimizer, str):
        values["optimizer"] = optimizer
    elif isinstance(optimizer, type) and issubclass(optimizer, Method):
        if METHODS.get(optimizer.name) is not optimizer:
            register(optimizer)
        values["optimizer"] = optimizer.name
    elif isinstance(optimizer, Method):
        for name in (*with_role(FinetuneConfig, "method"), "lora", "adapter", "train", "freeze"):
            if name not in OF_THE_LOOP and values.get(name):
                what = ", ".join(values["method"]) if name == "method" else name
                raise UserError(
                    f"`{what}` cannot be combined with an optimizer in memory, which has its own; leave it out."
                )
        if optimizer.steps:
            raise UserError(f"`optimizer` has taken {optimizer.steps} steps already: give a new one.")
        given.optimizer = optimizer
        values |= {"optimizer": MEMORY + optimizer.name, "lr": float(optimizer.param_groups[0]["lr"])}  # type: ignore[attr-defined]
        values |= {name: getattr(optimizer, name) for name in ("eps", "precision") if hasattr(optimizer, name)}
    else:
        raise UserError(
            f"`optimizer` is a {getattr(optimizer, '__name__', type(optimizer).__name__)}, which is not a method of metazo: "
            f"name one of {', '.join(METHODS)}, or give a class of metazo.optimizers."
        )
