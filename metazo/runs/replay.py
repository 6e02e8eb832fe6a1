"""Rebuild a tuned model from its base model and the step log alone: updates, and no forward pass.

The header has the settings, the hash of the base model's weights, and that of a tuner's networks. Every step is taken
again by `ZOOptimizer.step(replay=...)`, in the order and precision of the run, so that on the same
machine, versions and thread count the weights are bit-identical; the log of a complete run ends with their hash, which
is checked. In other environments sums may round differently, and the result is close, not equal (docs/guarantees.md).

A log may come from a stranger, so its settings are checked like a recipe's, and paths and addresses in them are never
opened: the caller names base model and tuner, or the tuner is the one in the local zoo with the right hash.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from metazo import zoo
from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.files import replaceable
from metazo.io.lock import NAME as LOCK
from metazo.io.lock import FolderLock
from metazo.io.plain import is_name, shown
from metazo.io.tensorfile import weights_hash
from metazo.models.adapters import merge_adapters
from metazo.models.assemble import as_loaded, assemble
from metazo.models.describe import describe, parts_of
from metazo.models.heads import Phrases
from metazo.models.load import LoadedModel
from metazo.models.select import unsaved
from metazo.models.sentence import SentenceClassifier
from metazo.runs.config import FinetuneConfig
from metazo.runs.folder import save_parts
from metazo.runs.inputs import architecture, tokenizer_hash, tokenizing
from metazo.runs.method import build_optimizer, resolve_device
from metazo.runs.optimizer_record import RATES, optimizer_record
from metazo.runs.own import StateFile
from metazo.runs.preconditions import check_merge, check_named
from metazo.runs.resources import refuse_ranks
from metazo.runs.tuned import Given
from metazo.runs.tuner_choice import of_log
from metazo.runs.tuner_record import networks_record, tuner_hash
from metazo.runs.verify import distance, end_of, environment_changes, replayable_header
from metazo.settings import as_path, build, check_path
from metazo.steplog.format import STEPS, Scan, change, scan

with needs("llm"):
    from transformers.utils import logging as transformers_logging


@dataclass
class Replayed:
    """The result of a replay."""

    steps: int
    """Number of steps taken."""
    seconds: float
    """Time of the steps alone."""
    weights: str
    """Hash of the rebuilt model."""
    identical: bool | None
    """Whether the model is the one that the run kept; None if the log does not record its hash."""
    differences: list[str]
    """Differences between this environment and that of the run, in words."""
    distance: float | None
    """Relative Euclidean distance of all weights from those in the run's own folder, if they are not identical."""
    loaded: LoadedModel
    """The model in memory."""
    notes: list[str] = field(default_factory=list)
    """What the log lacks, in sentences: the end of its run, or part of a line."""


def replay(
    log: str | Path,
    base: str | Path | LoadedModel | nn.Module,
    out: str | Path | None = None,
    to: int | None = None,
    *,
    tokenizer: Any = None,
    optimizer: Any = None,
    tuner: str | None = None,
    zoo_folder: str | Path | None = None,
    merge: bool = False,
    device: str = "auto",
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Replayed:
    """Take the steps of a log again from its base model.

    Args: log: a step log, or the folder of a run; base: folder or Hub id of the base model, or pico; or the model in memory
    as it was before the run's first step (a transformers model with `tokenizer`, a `LoadedModel`, or the module of a run on a
    loss of its own), whose weights are changed; optimizer: a new one over its tensors, if the run's was an object in memory;
    out: folder for the model, which is written completely or not at all (None: the model is only in memory); to: number of
    steps to take (default: up to the weights that the run kept, or all); tuner: location of the run's tuner, if it is not in
    the zoo folders; merge: add LoRA adapters to the weights at the end, so that a plain model is saved; tick: called with the
    number of steps done and their total.
    Raises UserError if the log is damaged, if base model or tuner are not the run's, or if the method cannot be replayed.
    """
    transformers_logging.disable_progress_bar()
    refuse_ranks("replay")
    log, out = as_path("log", log, "file"), None if out is None else as_path("out", out)
    if not isinstance(base, str | Path | LoadedModel | nn.Module):
        raise UserError(f"`base` is a folder, a Hub id, pico, or the model in memory, not {shown(base)}.")
    if isinstance(base, str | Path):
        check_path("base", base)
    found = scan(log / STEPS if log.is_dir() else log).sound()
    header = replayable_header(found, optimizer)
    given, base = _in_memory(base, tokenizer, optimizer)
    if out is None:
        return _replay(found, header, base, given, None, to, tuner, zoo_folder, device, merge, tick)
    lock = FolderLock(out := replaceable(out))
    lock.check()
    lock.check_empty()
    with lock:
        return _replay(found, header, base, given, out, to, tuner, zoo_folder, device, merge, tick)


def _replay(
    found: Scan,
    header: dict[str, Any],
    base: str,
    given: Given,
    out: Path | None,
    to: int | None,
    tuner: str | None,
    zoo_folder: str | Path | None,
    device: str,
    merge: bool,
    tick: Callable[[int, int], None],
) -> Replayed:
    log, notes = found.path, end_of(found, to)
    kept = found.end["kept"] if found.end else len(found.steps)
    count = kept if to is None else to
    if type(count) is not int or not 0 <= count <= len(found.steps):
        raise UserError(
            f"`to` is {shown(count)} and the log has {len(found.steps)} steps; give 0 to {len(found.steps)}."
        )
    loaded, optimizer = _rebuilt(header, base, given, tuner, zoo_folder, device, merge, saved=out is not None)
    started = time.monotonic()
    for step in found.steps[:count]:
        if not all(math.isfinite(rate) and rate >= 0 for rate in step.lr):
            raise UserError(f"{log} cannot be replayed: the learning rate of step {step.step} is {list(step.lr)[:3]}.")
        optimizer.step(replay=step)
        tick(step.step + 1, count)
    seconds = time.monotonic() - started
    weights = weights_hash(loaded.model.named_parameters())
    known = found.end is not None and found.end["weights"] is not None and count == kept
    identical = weights == found.end["weights"] if known and found.end else None
    differences = environment_changes(header, found, loaded)
    if not all(bool(p.isfinite().all()) for p in loaded.model.parameters() if p.requires_grad):
        raise UserError(
            f"{log} cannot be replayed to step {count}: the weights are not finite there; take an earlier `to`."
        )
    if identical is False and not differences:
        raise UserError(
            f"{log} leads to weights with the hash {weights[:16]}..., not to those that the run kept, in the same environment: "
            "the header does not say how the run was made (its method, a setting or a rate was changed)."
        )
    apart = distance(loaded.model, log) if identical is False else None
    if merge:
        loaded.model = merge_adapters(loaded.model)
    if out is not None:
        record = header["trained"] if isinstance(header.get("trained"), dict) else {}
        record = record | ({"quantize": loaded.quantize} if loaded.quantize else {})
        if record and loaded.kind != "own":
            describe(loaded.model, record)
        _save(loaded, out, record)
    return Replayed(count, seconds, weights, identical, differences, apart, loaded, notes)


def _in_memory(base: str | Path | LoadedModel | nn.Module, tokenizer: Any, optimizer: Any) -> tuple[Given, str]:
    """The objects from which a replay starts, and the name of the base model."""
    if isinstance(base, nn.Module):
        base = as_loaded(base, tokenizer)
    if isinstance(base, LoadedModel):
        return Given(loaded=base, optimizer=optimizer), base.name
    return Given(optimizer=optimizer), str(base)


def _rebuilt(
    header: dict[str, Any],
    base: str,
    given: Given,
    tuner: str | None,
    zoo_folder: str | Path | None,
    device: str,
    merge: bool,
    saved: bool,
) -> tuple[LoadedModel, Any]:
    """Base model and optimizer as the run had them before its first step."""
    settings = header["settings"] | {"model": base, "out": Path(), "optimizer": header["method"]}
    settings["tuner"] = tuner or _tuner(header, zoo_folder)
    config = build(FinetuneConfig, settings | {"merge": merge})
    check_merge(config)
    attention = config.attn_implementation
    if given.loaded is None and attention and "/" in attention:  # transformers would load and run it
        raise UserError(
            f"The log's `attn_implementation` {shown(attention)} names code of the Hub, which a replay does not load; give the "
            "base model in memory, with this attention, as `base`."
        )
    loaded, _ = assemble(config, labels=header.get("labels"), device=resolve_device(device), given=given.loaded)
    if saved and not merge:
        check_named(config, loaded)
    if loaded.tokenizer is not None and header.get("tokenizer") not in (None, tokenizer_hash(loaded.tokenizer)):
        raise UserError(
            f"`base` {base} is not the base model of this log: its tokenizer has other tokens or splits text in another way."
        )
    then = header.get("tokenizing") if loaded.tokenizer is not None else None
    if isinstance(then, dict) and (what := change(then, tokenizing(loaded.tokenizer))) is not None:
        raise UserError(f"`base` {base} is not the base model of this log: of its tokenizer {what}.")
    if unsaved(loaded.model) and "unsaved" not in header:
        raise UserError(
            f"the log was made by an earlier version of metazo, which trained weights of {base} that transformers does not "
            "save: replay it with that version"
        )
    _make_head(loaded, header.get("head"))
    weights = weights_hash(loaded.model.named_parameters())
    if weights != header["weights"]:
        if loaded.cast and "cast" not in header:
            raise UserError(
                f"the log was made by an earlier version of metazo, which left a part of {base}, a bitsandbytes checkpoint, or "
                f"its arithmetic, in {loaded.cast} as it was saved, whatever `dtype` said: replay it with that version, or, "
                f"if all of it was saved so, on the model in memory, as load_model(..., dtype={loaded.cast!r}) gives it"
            )
        raise UserError(
            f"`base` {base} is not the base model of this log: its weights have the hash {weights[:16]}..., and the log began "
            f"from {header['weights'][:16]}... (called {header.get('model')!r} there, in {config.dtype})."
        )
    then = header.get("architecture")
    if isinstance(then, dict) and (what := change(then, architecture(loaded.model))) is not None:
        where = "" if what.startswith("the buffer ") else "in its configuration "
        raise UserError(f"`base` {base} is not the base model of this log: {where}{what}.")
    optimizer = given.optimizer or build_optimizer(config, loaded.model)
    optimizer.max_loss = config.max_loss
    then = header.get("optimizer") if given.optimizer is not None else None
    if isinstance(then, dict):
        now = optimizer_record(optimizer) | {RATES: then.get(RATES)}  # each step has its own
        if (what := change(then, now)) is not None:
            raise UserError(f"`optimizer` is not the one of this log: {what}; make it as the run had it.")
    if optimizer.noise.name != header["noise"]:
        raise UserError(
            f"The log's noise is {header['noise']!r}, and this version of metazo makes {optimizer.noise.name!r}."
        )
    if tuner_hash(optimizer) != header.get("tuner"):
        raise UserError(
            f"`tuner` {tuner or settings['tuner']} is not the tuner of this log: its networks have another hash."
        )
    then = header.get("networks")
    if isinstance(then, dict) and (what := change(then, networks_record(optimizer) or {})) is not None:
        raise UserError(
            f"`tuner` {tuner or settings['tuner']} is not the tuner of this log, although its networks are the same: {what}; "
            "give the one that the run had."
        )
    return loaded, optimizer


def _make_head(loaded: LoadedModel, record: Any) -> None:
    """Make a head of label phrases again, from the phrases and offsets in the log, before the weights change; the head of a
    base that was trained with one is made."""
    if not isinstance(loaded.model, SentenceClassifier) or not isinstance(loaded.model.head, Phrases):
        return
    phrases, offset = (record.get(key) for key in ("phrases", "offset")) if isinstance(record, dict) else (None, None)
    if phrases is None and not loaded.new_head:  # the base has the head, made by an earlier run
        return
    if not isinstance(phrases, list) or not isinstance(offset, list) or not all(map(is_name, phrases)):
        raise UserError("the log cannot be replayed: its header lacks the label phrases of the head")
    if not all(isinstance(number, float) and math.isfinite(number) for number in offset):
        raise UserError("the log cannot be replayed: the offsets of the head in its header are not finite numbers")
    loaded.model.set_phrases(loaded.tokenizer, phrases, offset)


def _tuner(header: dict[str, Any], zoo_folder: str | Path | None) -> str | None:
    """The tuner of the log if none is named: the one in the zoo folders with the log's hash."""
    name, wanted = header["settings"].get("tuner"), header.get("tuner")
    if wanted is None or str(name).startswith("random:"):
        return name if wanted else None
    found, refused = of_log(header, [known for known in zoo.tuners(zoo_folder) if known.path.is_file()])  # no downloads
    if found is None:
        raise UserError(
            f"The log's tuner (called {name!r} there) is not in the zoo folders{refused}; "
            "give its location as `tuner`, or its zoo as `zoo_folder`."
        )
    return str(found.path)


def _save(loaded: LoadedModel, out: Path, record: dict[str, Any]) -> None:
    temporary = out.with_name(f".{out.name[:60]}.{os.getpid()}.tmp")
    try:
        parts = [StateFile(loaded.model)] if loaded.kind == "own" else parts_of(loaded, record)
        save_parts(temporary, *parts)
        (out / LOCK).unlink(missing_ok=True)
        os.replace(temporary, out)  # an empty folder is replaced; a folder with files is not
    except OSError as error:
        raise UserError(
            f"`out` {out} cannot be written ({error.strerror or error}), and nothing was left there; choose another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
