"""A dry run: the plan of a run, with its time and the tuners that fit, without loading a weight.

It reads configurations, the headers of safetensors files, the tokenizer and the rows. The model is on the meta
device (metazo/models/skeleton.py), and memory and operations are counted there (metazo/runs/estimate.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from metazo import zoo
from metazo.errors import UserError
from metazo.feedback.tuner import describe as describe_blocks
from metazo.io.files import expanded
from metazo.io.processes import launched
from metazo.models.assemble import assemble, base_of, check_trainable
from metazo.models.compressed import saved_quantised
from metazo.models.embedded import EMBEDDED
from metazo.models.load import LoadedModel
from metazo.models.skeleton import skeleton, stored
from metazo.runs.batches import padding
from metazo.runs.choose import choose
from metazo.runs.config import AUTO, FinetuneConfig
from metazo.runs.estimate import Estimate, Followed, estimate, look_ahead, measure_rates, step_seconds, weight_bytes
from metazo.runs.examples import longest_batch, longest_input, prepared_task
from metazo.runs.fit_precision import fit_precision
from metazo.runs.left import Begun
from metazo.runs.locate import as_begun, from_anywhere
from metazo.runs.method import build_optimizer, resolve_device, unused
from metazo.runs.plan import plan, rows_of
from metazo.runs.preconditions import check_gradient, check_saved, check_settings
from metazo.runs.resources import free_memory, require_space, size
from metazo.runs.schedule import keep_cost, number_of_steps
from metazo.tasks import Prepared, Task, resolve
from metazo.tasks.closures import BatchLoss
from metazo.tasks.encode import Encoder
from metazo.tasks.options import arranged
from metazo.tasks.prepared import last_logits, option_likelihoods

META = torch.device("meta")
ASSUMED = 256
"""Tokens of an input, if the rows cannot be read and there is no `max_length`."""


def dry_run(config: FinetuneConfig) -> dict[str, Any]:
    """The plan of a run, without loading its weights.

    In addition to the entries of `plan`: "time" of a step and of all steps, "tuners" of the zoo that fit, "weights on disk",
    and "notes", sentences about what could not be read or estimated. "bytes" has the figures of the memory as numbers.
    With `resume`, "left", "time" and "disk" are those of the rest of the run in `out`, whose folder is not changed.
    Raises UserError for settings that a run would refuse, except that rows, tokenizer and weights may be missing, and that a
    finished or interrupted run may be in `out`; with `resume`, if that run cannot be resumed.
    """
    more: list[str] = []
    begun = Begun(config := as_begun(config), more.append) if config.resume else None
    config = from_anywhere(config)
    check_settings(config, execute=False)
    device, task = resolve_device(config.device), resolve(config.task)
    labels = task.num_labels
    folder, revision = base_of(config.model, config.revision)
    loaded = skeleton(
        folder,
        kind=config.kind,
        dtype=config.dtype,
        num_labels=labels,
        head=config.head,
        quantize=config.quantize,
        revision=revision,
        attn_implementation=config.attn_implementation,
    )
    loaded.name = config.model
    notes = [f"{folder}: {note}." for note in loaded.notes] + _about_files(folder, loaded.model)
    notes += _not_counted(config, loaded.model)
    if config.adapters is not None and config.adapters.kind == "continue":
        raise UserError(
            "`adapter` continue has no dry run, because adapters that exist are not read: for their memory, name their kind as "
            "`adapter` and their rank as `adapter_rank`."
        )
    check_trainable(loaded, config)
    loaded, _ = assemble(config, labels=labels, device=META, given=loaded)
    check_saved(config, loaded)
    check_gradient(config, loaded)
    prepared, problem = _rows(config, task, loaded)
    limit = longest_input(config, loaded)
    loss, length, at_last = _loss(config, loaded, prepared, limit)
    if config.objective is not None:
        loss = _without_gradient(loss)
    if prepared is None:
        notes.append(f"The rows were not read ({problem}); inputs of {length} tokens are assumed.")
    else:
        notes += prepared.notes + padding(config, prepared.train)
        if begun is not None:
            begun.check_data(prepared)
    chosen = None
    if config.optimizer == AUTO:
        with Followed():  # masks ask for numbers
            config, chosen = choose(config, loaded.model, loss, META, free_memory(device))
    notes += unused(config)
    free = free_memory(device)
    parts, storage = config.tensor_parallel * config.fsdp, None
    if parts == 1:  # as in a run
        config, storage = fit_precision(config, loaded.model, loss, free - weight_bytes(loaded.model))
    optimizer = build_optimizer(config, loaded.model)
    examples = len(prepared.train) if prepared else config.train_examples
    if optimizer.wants_full_closure:
        over_all: Any = partial(loss)
        optimizer.full_closure, over_all.batches = over_all, math.ceil(examples / config.batch_size)
    look_ahead(optimizer, loss, at_last)
    if begun is not None and begun.log is not None:
        keep_cost(optimizer, begun.log.header)
    steps = number_of_steps(config, optimizer, examples)
    a_step = optimizer.forwards_in(steps, config.accumulate) / steps
    rows = rows_of(config, prepared, limit) if prepared else f"{config.task}: rows not read"
    found = plan(config, loaded, optimizer, rows, steps, round(steps * a_step))
    if chosen:
        found["optimizer"] = chosen
    if storage:
        found["precision"] = storage
    counted = estimate(loaded.model, optimizer, loss, config.accumulate)
    found["memory"] = _memory(config, counted, length, free)
    width = getattr(loaded.model.config.get_text_config(), "hidden_size", 1024)
    rates = measure_rates(device, loaded.dtype, width, config.batch_size * length)
    seconds = step_seconds(counted, optimizer, rates, config.accumulate)
    found["time"] = (
        f"estimated at least {_time(seconds)} per step, {_time(seconds * steps)} for all, without evaluations: products of "
        "matrices, passes over the weights and noise alone (steps of small models take two to three times as long), from "
        f"speeds measured on this device: {rates.operations / 1e9:,.0f} billion operations, {size(rates.bytes)} and "
        f"{rates.noise / 1e9:.2g} billion weights with noise per second"
    )
    found["tuners"] = _tuners(config, loaded.model)
    if begun is not None:
        found |= begun.left(task, optimizer.replayable, steps, a_step, seconds, found["bytes on disk"], _time)
    elif config.out is not None:
        try:
            require_space(config.out, found["bytes on disk"], "The run")
        except UserError as error:
            notes.append(str(error))
    divided = counted.weights + counted.state  # over the processes, but for small tensors
    each = counted.peak - divided + divided // parts
    if parts > 1:
        notes.append(
            f"Of {parts} processes each takes about {size(each)}; the memory and the time above are those of one."
        )
    if each > free:
        notes.append(f"The run does not fit: it takes {size(each)} and {size(free)} are free on {device}.")
    found["notes"] = [*notes, *more, *(f"{note[0].upper()}{note[1:]}." for note in counted.notes)]
    found["bytes"] = {"weights": counted.weights, "inference": counted.inference, "peak": counted.peak, "free": free}
    found["seconds per step"] = seconds
    return found


def _not_counted(config: FinetuneConfig, model: nn.Module) -> list[str]:
    """Sentences about settings whose effect on memory and time is not counted."""
    notes = []
    if config.objective is not None:
        notes.append(
            f"Memory and time are those of the task's loss; what `objective` {config.objective} adds is not known."
        )
    whole = f"Memory and time are those of {config.dtype} weights"
    if config.quantize is not None:
        notes.append(
            f"The time is that of {config.dtype} weights; what `quantize` {config.quantize} adds is not known. Loading takes "
            f"up to the memory of {config.dtype} weights, until they are quantised."
        )
    elif saved_quantised(model).get("quant_method") not in (None, "compressed-tensors"):  # which is decompressed
        notes.append(f"{whole}; the checkpoint is quantised, so that the memory is less.")
    if (processes := launched()) > 1:
        notes.append(f"Memory and time are those of one process that does the work of all {processes}.")
    if config.device_map is not None:
        notes.append(f"Memory is that of all devices together; `device_map` {config.device_map} divides the weights.")
    return notes


def _without_gradient(loss: Callable[[], Any]) -> Callable[[], Any]:
    """An objective has no gradient, so the choice of a method must not find one."""
    return lambda: loss().detach()


def _rows(config: FinetuneConfig, task: Task, loaded: LoadedModel) -> tuple[Prepared | None, str]:
    """The encoded rows, or None and the reason why they cannot be read."""
    if loaded.tokenizer is None:
        return None, "there is no tokenizer"
    Encoder(task, loaded, config.max_length)  # raises UserError for a task that the model cannot do, whatever its rows
    try:
        return prepared_task(config, task, loaded), ""
    except UserError as error:
        return None, str(error).rstrip(".")


def _loss(
    config: FinetuneConfig, loaded: LoadedModel, prepared: Prepared | None, limit: int
) -> tuple[Callable[[], Any], int, bool]:
    """A loss over the longest batch, on the meta device; the length of its inputs in tokens; and whether it reads the last
    position alone."""
    batch: dict[str, Any] = {}
    if prepared is not None:
        longest = longest_batch(config, prepared.train)
        batch = prepared.collate(longest)
        length = batch["input_ids"].shape[1]
        if "rows" not in batch:  # numbers that decide a shape
            return BatchLoss(loaded.model, prepared, longest, META), length, loaded.kind == "causal"
        if "node_ids" in batch:
            there = batch.to(META)
            inputs, keep, *_ = arranged(loaded.model, there)
            return lambda: option_likelihoods(loaded.model, there).mean(), inputs["input_ids"].shape[1], keep == 1
    else:
        length = min(limit, config.max_length or ASSUMED)
    rows = len(batch["input_ids"]) if prepared is not None else config.batch_size
    keep = batch["answer"].shape[1] + 1 if prepared is not None else 1
    answers = len(batch["answer"]) if prepared is not None else rows
    return assumed_loss(loaded, rows, length, keep, answers), length, keep == 1


def assumed_loss(
    loaded: LoadedModel, rows: int, length: int, keep: int = 1, answers: int | None = None
) -> Callable[[], Any]:
    """A forward pass over a padded batch (rows, length) on the meta device, with logits at `keep` positions. answers: rows of
    a decoder that reads them beside the prompts, by default as many.
    """
    ids = torch.zeros(rows, length, dtype=torch.long, device=META)
    batch: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if loaded.kind == "seq2seq":
        answers = answers or rows
        batch["decoder_input_ids"] = ids.new_zeros(answers, keep)
        if answers != rows:
            batch["prompt"] = ids.new_zeros(answers)
    if loaded.kind == "causal":
        batch["position_ids"] = torch.zeros_like(ids)
    if loaded.kind in ("causal", "seq2seq"):
        return lambda: last_logits(loaded.model, batch, keep).float().logsumexp(-1).mean()
    return lambda: loaded.model(**batch).logits.float().logsumexp(-1).mean()


def _about_files(folder: str, model: nn.Module) -> list[str]:
    """A sentence about the weights on disk, from the headers of their files."""
    path = EMBEDDED.get(str(folder)) or expanded(folder)
    if not path.is_dir():
        return []
    files = stored(path)
    if files is None:
        return [f"{folder} has no safetensors files; a run needs the weights."]
    there = sum(torch.Size(shape).numel() for shape, _ in files.tensors.values())
    dtypes = ", ".join(sorted({dtype for _, dtype in files.tensors.values()}))
    needed = sum(parameter.numel() for parameter in model.parameters())
    what = f"The weights on disk are {there:,} numbers ({dtypes}) in {files.files} files, {size(files.bytes)}"
    less = f", and the model has {needed:,}; a new head or a missing file would explain it" if there < needed else ""
    return [f"{what}{less}."]


def _memory(config: FinetuneConfig, counted: Estimate, length: int, free: int) -> str:
    more = counted.peak / counted.inference
    peak = "peak of a step at least" if counted.notes else "peak of a step"
    return (
        f"inference {size(counted.inference)} (weights {size(counted.weights)}); {peak} {size(counted.peak)}, "
        f"{more:.2f}x, with {config.optimizer} at {config.batch_size} inputs of {length} tokens; {size(free)} are free"
    )


def _tuners(config: FinetuneConfig, model: nn.Module) -> str:
    """The tuners of the zoo that fit the model, in words."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    names = [f"{found.entry.name} (scale)" for found in zoo.find(shapes, zoo=config.zoo)]
    try:
        blocks = describe_blocks(model, "").fingerprint
        fitted = [found for found in zoo.tuners(config.zoo, "feedback") if found.entry.fingerprint == blocks]
        names += [f"{found.entry.name} (feedback)" for found in fitted]
    except UserError:  # no residual stream, so no feedback
        pass
    return ", ".join(names) or "none in the zoo fits; metazo meta-train makes one"


def _time(seconds: float) -> str:
    for unit, length in (("ms", 1e-3), ("s", 1.0), ("min", 60.0), ("h", 3600.0)):
        if seconds < {"ms": 1, "s": 100, "min": 6000}.get(unit, float("inf")):
            return f"{seconds / length:.3g} {unit}"
    raise AssertionError
