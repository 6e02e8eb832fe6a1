"""What identifies the base model of adapters, and of a tuner: a hash of its weights, written beside them and compared later."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

from torch import nn

from metazo.errors import UserError
from metazo.feedback.tuner import block_tensors
from metazo.io.tensorfile import THREADS, weights_hash
from metazo.models.embedded import ADAPTERS
from metazo.models.load import LoadedModel
from metazo.models.parts import divided
from metazo.models.quantize import heads_of, quantised
from metazo.models.sentence import SentenceClassifier

BASE = "base_weights"
"""Key of it in the file beside adapters, and in the recipe of a tuner."""


def base_weights(loaded: LoadedModel) -> dict[str, str] | None:
    """How a model without adapters was loaded (kind and dtype), and a sha256 over its weights.

    The head and what the checkpoint did not have are left out: they are saved with the adapters. So are the names, which
    versions of transformers change, and how often a tensor is there, which is once or twice if it is tied. None for weights
    that the checkpoint and the dtype do not decide alone, or that are not here: quantised, divided, on a device map, in memory.
    """
    model = loaded.model
    apart = isinstance(model, SentenceClassifier) or divided(model) or hasattr(model, "hf_device_map")
    apart = apart or any(parameter.is_meta for parameter in model.parameters())
    if apart or quantised(model) or loaded.name.startswith("memory:"):
        return None
    heads, unsaved = heads_of(model), set(loaded.unsaved)
    kept = [p for name, p in model.named_parameters() if name not in unsaved and name.split(".")[0] not in heads]
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        rows = set(pool.map(lambda parameter: weights_hash([("", parameter)], at_once=False), kept))
    dtype = str(loaded.dtype).removeprefix("torch.")
    return {"loaded_as": f"{loaded.kind} {dtype}", "sha256": sha256("\n".join(sorted(rows)).encode()).hexdigest()}


def block_weights(model: nn.Module) -> dict[str, str] | None:
    """The dtypes of the weights in a model's list of blocks, and a sha256 over them: by these a tuner knows the model for which
    it was made, whatever the folder is called, below adapters and under another head too.

    None if the model has no such list (`find_residual`), or if its weights are quantised, divided, or not here.
    """
    try:
        tensors = block_tensors(model)
    except UserError:
        return None
    if divided(model) or quantised(model) or any(tensor.is_meta for _, tensor in tensors):
        return None
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors})
    return {"dtype": " ".join(dtypes), "sha256": weights_hash(tensors)}


def check_base(known: Any, found: dict[str, str] | None, folder: object, base: str, called: str) -> None:
    """Raises UserError if the base of the adapters in a folder has other weights than the one that they were trained on.

    known: `base_weights` of the latter; found: of the former. They are compared if both models were loaded in the same way.
    """
    if not isinstance(known, dict) or found is None or known.get("loaded_as") != found["loaded_as"]:
        return
    if known.get("sha256") != found["sha256"]:
        then, now = str(known.get("sha256"))[:16], found["sha256"][:16]
        raise UserError(
            f"the adapters in {folder} were trained on another base model than {base}: its weights have the hash {now}..., and "
            f"those of the training (called {called!r} there) had {then}...; name the folder of the right one as "
            f"base_model_name_or_path in {folder}/{ADAPTERS}, or delete base_weights in its metazo.json, if this is the right "
            "one."
        )
