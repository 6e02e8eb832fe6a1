"""The plan of a run before it starts: work, memory and disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from metazo.models.load import LoadedModel
from metazo.models.parts import divided, held_bytes
from metazo.models.quantize import bytes_of, entries
from metazo.runs.config import FinetuneConfig
from metazo.runs.estimate import state_bytes, weight_bytes
from metazo.runs.method import resolve_device
from metazo.runs.resources import size
from metazo.runs.schedule import snapshot_steps, warmup_steps
from metazo.step.precision import cost

SMALL_FILES = 150_000
"""Bytes of settings, metrics, summary, card and picture: at most, for a run with a few hundred evaluations."""


def written(config: FinetuneConfig, loaded: LoadedModel, optimizer: Any, steps: int) -> dict[str, int]:
    """Bytes of the files of a run: "model" (its weights), "snapshots", "best", "log" and "others", and "most", the largest
    size of the folder.

    If the log can be replayed, a file is removed before the next of its kind is written, and all are before the model is:
    whatever a kill leaves is made again from the log.
    """
    model = loaded.model
    once = not divided(model)  # transformers writes the tied tensors of a divided model under each of their names
    weights = sum(bytes_of(parameter) for _, parameter in model.named_parameters(remove_duplicate=once))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    snapshot = trained + state_bytes(optimizer)
    snapshots = snapshot if snapshot_steps(config, optimizer.replayable) else 0
    best = trained if config.keep == "best" and not divided(model) else 0  # its parts are kept in main memory
    saved = 0 if config.keep == "none" else trained if config.adapters and not config.merge else weights
    log = record_bytes(optimizer) * steps
    together = max(snapshots + best, saved)
    if not optimizer.replayable:  # the next is complete before the last is removed
        together = max(2 * snapshots + best, snapshots + 2 * best, snapshots + best + saved)
    others = SMALL_FILES + (tokenizer_bytes(loaded.tokenizer) if saved else 0)
    most = together + log + others
    return {"model": saved, "snapshots": snapshots, "best": best, "log": log, "others": others, "most": most}


def tokenizer_bytes(tokenizer: Any) -> int:
    """Bytes of a tokenizer's files; an estimate if it is not one of the library tokenizers."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return 20 * len(tokenizer or ()) if fast is None else len(fast.to_str(pretty=True).encode())


def record_bytes(optimizer: Any) -> int:
    """Estimated bytes of a step in the log: losses, and a seed and a coefficient per query."""
    estimator = getattr(optimizer, "estimator", None)
    return 110 if estimator is None else 80 + 20 * (len(estimator.probes()) + 2 * estimator.queries)


def plan(
    config: FinetuneConfig, loaded: LoadedModel, optimizer: Any, rows: str, steps: int, forwards: int
) -> dict[str, Any]:
    """The part of a plan that a run shows when it starts. rows: a description of task and rows; forwards: of all steps."""
    model, group = loaded.model, optimizer.param_groups[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    disk = written(config, loaded, optimizer, steps)
    return {
        "model": f"{loaded.name} ({loaded.kind}, {config.dtype}, {resolve_device(config.device)})",
        "task": rows,
        "trained weights": f"{sum(map(entries, trained)):,} of {sum(map(entries, model.parameters())):,}",
        "optimizer": config.optimizer + (f", tuner {config.tuner}" if config.tuner else ""),
        "learning rate": f"{group['lr']:g} {config.schedule}"
        + (f", {warmup_steps(config.warmup, steps):,} steps of warmup" if config.warmup else ""),
        "effective learning rate": f"{group['lr'] * optimizer.energy:g}"
        + (" (times the mean square of a direction's entries)" if optimizer.energy != 1 else ""),
        "steps": f"{'at most ' if config.patience else ''}{steps:,}, {forwards:,} forward passes over "
        f"{config.batch_size} examples",
        "precision": _precision(config, optimizer, trained),
        "memory": f"weights {_held(model)}, optimizer {size(state_bytes(optimizer))}, and the activations of one batch",
        "disk": f"at most {size(disk['most'])}: {_files(disk)}; log {size(disk['log'])}; other files {size(disk['others'])}",
        "bytes on disk": disk["most"],
    }


def _files(disk: dict[str, int]) -> str:
    """The large files of a run in words."""
    names = {"best": "best weights", "snapshots": "snapshot"}
    before = [f"{words} {size(disk[name])}" for name, words in names.items() if disk[name]]
    return (f"{' and '.join(before)} until the end, then " if before else "") + f"the tuned model {size(disk['model'])}"


def _held(model: nn.Module) -> str:
    """The memory of the weights in words."""
    part = f"{size(held_bytes(model))} on this process, of " if divided(model) else ""
    return part + size(weight_bytes(model))


def _precision(config: FinetuneConfig, optimizer: Any, trained: Sequence[torch.Tensor]) -> str:
    if "precision" not in optimizer.common:
        return f"weights updated in {config.dtype}"
    words, more = cost(config.precision, trained)
    return f"{words}: {size(more)}"


def rows_of(config: FinetuneConfig, prepared: Any, limit: int) -> str:
    """Task and rows in words."""
    counts = f"{len(prepared.train)} train, {len(prepared.dev)} dev, {len(prepared.test)} test"
    return f"{config.task}: {counts}" + (f"; inputs of at most {limit} tokens" if limit else " batches")
