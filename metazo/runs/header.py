"""The header of a step log: hashes of the base model's weights and of the data, settings, and library versions."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch

import metazo
from metazo.io.processes import world
from metazo.models.parts import hash_of
from metazo.models.select import unsaved
from metazo.models.sentence import SentenceClassifier
from metazo.runs.batches import order_of
from metazo.runs.inputs import data_hash, inputs, own_inputs, tokenizer_hash, tokenizing
from metazo.runs.machine import instructions, processor, versions
from metazo.runs.optimizer_record import optimizer_record
from metazo.runs.schedule import COUNTING
from metazo.runs.tuned import MEMORY
from metazo.runs.tuner_record import networks_record, trust_hash, tuner_hash
from metazo.tasks import Prepared, Task
from metazo.tasks.data import VERSION

if TYPE_CHECKING:
    from metazo.runs.setup import Setup

PACKAGES = ("torch", "transformers", "numpy", "numba")


def header(settings: dict[str, Any], setup: Setup) -> dict[str, Any]:
    """The header of a run's step log, with the `settings` that affect results. Call it before the first step,
    in all processes."""
    loaded, optimizer, task = setup.loaded, setup.optimizer, setup.prepared.task
    return {
        "model": loaded.name,
        "weights": hash_of(loaded.model),
        **_inputs(setup),
        "tokenizer": tokenizer_hash(loaded.tokenizer) if loaded.tokenizer is not None else None,
        "tokenizing": tokenizing(loaded.tokenizer) if loaded.tokenizer is not None else None,
        "labels": task.num_labels if isinstance(task, Task) else None,
        "task": task.name,
        "data": data_hash(setup.prepared) if isinstance(setup.prepared, Prepared) else None,
        "objective": setup.objective.source if setup.objective else None,
        "split": VERSION,
        **order_of(setup.config, len(setup.prepared.train)),
        "trained": setup.prepared.record,
        "head": loaded.model.phrase_record() if isinstance(loaded.model, SentenceClassifier) else None,
        "method": settings["optimizer"],
        "noise": optimizer.noise.name if optimizer.noise else None,
        "tuner": tuner_hash(optimizer),
        "trust": trust_hash(optimizer),
        "networks": networks_record(optimizer),
        **({"optimizer": optimizer_record(optimizer)} if settings["optimizer"].startswith(MEMORY) else {}),
        "precision": settings["precision"],
        **({"unsaved": "frozen"} if unsaved(loaded.model) else {}),
        **({"cast": loaded.cast} if loaded.cast else {}),
        **({"decay": "decoupled"} if settings["optimizer"] == "first-order-sgd" and settings["weight_decay"] else {}),
        "counting": COUNTING,
        **({"race": setup.raced} if setup.raced else {}),
        **({"cost": optimizer.measured_cost} if getattr(optimizer, "measured_cost", None) else {}),
        "settings": settings,
        "environment": environment(setup.device),
    }


def _inputs(setup: Setup) -> dict[str, Any]:
    if isinstance(setup.prepared, Prepared):
        found = inputs(setup.prepared, setup.loaded.model)
        if (
            setup.loaded.new_head
        ):  # made by the run itself, on another machine or with other threads with other last bits
            kept = {key: value for key, value in found["architecture"].items() if not key.startswith("buffer head.")}
            return found | {"architecture": kept}
        return found
    return own_inputs(setup.prepared, setup.loaded.model, setup.device)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, threads, processes, kind of device and processor, on which the last bits of a result may depend."""
    return {
        "metazo": metazo.__version__,
        "python": platform.python_version(),
        **versions(PACKAGES),
        "threads": torch.get_num_threads(),
        "processes": world(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "processor": processor(),
        **instructions(),
    }
