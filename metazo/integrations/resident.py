"""The parameters of a model that is sharded over processes or offloaded, each where its numbers are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metazo.blocks import LocalShard
from metazo.errors import UserError


def local_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of every parameter, to be given to an optimizer instead of `model.named_parameters()`:

        fully_shard(model)                                           # or accelerate.dispatch_model, cpu_offload, disk_offload
        optimizer = metazo.MeZO(local_parameters(model), lr=1e-6)

    * A parameter of `fully_shard` (FSDP2), or another DTensor that is cut into rows (`Shard(0)`), is a `LocalShard`: the rows
      of this process, in the same memory. Each process makes the noise of its own rows, so that the weights are those of a
      model that is not sharded, bit for bit, if the losses are. `reshard_after_forward` is turned on in every module,
      because a forward pass would otherwise use the rows that it gathered before the probe.
    * A parameter that accelerate offloads to main memory is the tensor there, and one that it offloads to disk is its file in
      the offload folder, mapped into memory and changed in place. The forward pass loads what is there.
    * All other parameters are given as they are.

    A tied parameter comes once. The optimizer's state is that of this process's rows.
    Raises UserError for another kind of sharding, for weights that accelerate reads from a checkpoint, which must not change,
    and for tied weights on disk, which are several files. A process that is killed leaves a probe in the offload folder:
    do not use the folder again.
    """
    _reshard(model)
    offloaded = dict(_offloaded(model))
    _check_ties(offloaded)
    found, seen = [], set()
    for name, parameter in model.named_parameters():
        if name in offloaded:
            local: nn.Parameter = offloaded[name]
        elif hasattr(parameter, "placements"):
            local = _rows(name, parameter)
        else:
            local = parameter
        key = (local.data_ptr(), local.shape) if local.numel() and name in offloaded else id(parameter)
        if key not in seen:
            seen.add(key)
            found.append((name, local))
    return found


def _reshard(model: nn.Module) -> None:
    """Have every module of `fully_shard` gather its rows in each forward pass again."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def _rows(name: str, parameter: Any) -> nn.Parameter:
    """This process's rows of a DTensor."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, cuts = parameter.device_mesh, [(k, p) for k, p in enumerate(parameter.placements) if type(p) is not Replicate]
    local = parameter.to_local().detach()
    if not cuts:
        return nn.Parameter(local, parameter.requires_grad)
    (dimension, cut), rows = cuts[0], parameter.shape[0] if parameter.ndim else 1
    if len(cuts) > 1 or type(cut) is not Shard or cut.dim != 0 or not local.is_contiguous():
        raise UserError(
            f"{name} is sharded as {parameter.placements}, and only rows can be trained (Shard(0), as fully_shard makes "
            "them): shard it in this way, or freeze it."
        )
    most = -(-rows // mesh.size(dimension))
    first = min(mesh.get_local_rank(dimension) * most, rows)
    if len(local) != min(most, rows - first):
        raise UserError(f"{name} has {len(local)} rows on this process, in no order that is known: shard it evenly.")
    return LocalShard(local, parameter.requires_grad, first * (parameter.numel() // rows), parameter.shape)  # type: ignore[call-arg]


def _offloaded(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and stored tensor of every parameter that a hook of accelerate loads for the forward pass."""
    for prefix, module in model.named_modules():
        for hook in _hooks(module):
            if not getattr(hook, "offload", False) or hook.weights_map is None:
                continue
            for name, parameter in module.named_parameters(recurse=hook.place_submodules):
                whole = f"{prefix}.{name}" if prefix else name
                if parameter.device.type == "meta":
                    stored = _stored(hook.weights_map, name, whole) if parameter.requires_grad else parameter
                    yield whole, nn.Parameter(stored.detach(), parameter.requires_grad)


def _check_ties(offloaded: Mapping[str, nn.Parameter]) -> None:
    """Raises UserError for two trained matrices with the same numbers in two places: they were tied before they were offloaded.

    Nothing else tells that they were. Zeros are no sign of a tie: LoRA's matrices start with them.
    """
    matrices = [(name, p) for name, p in offloaded.items() if p.requires_grad and p.ndim > 1]
    for (name, first), (other, second) in combinations(matrices, 2):
        if first.shape == second.shape and first.data_ptr() != second.data_ptr() and first.dtype == second.dtype:
            with torch.no_grad():
                if first.equal(second) and first.any():
                    raise UserError(
                        f"{name} and {other} are tied, and on disk they are two files, which would drift apart: keep both in "
                        "main memory, or freeze them."
                    )


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _stored(weights: Mapping[str, Tensor], name: str, whole: str) -> Tensor:
    """The tensor from which accelerate loads a weight, to be changed in place."""
    while hasattr(weights, "prefix"):
        name, weights = f"{weights.prefix}{name}", weights.dataset  # type: ignore[attr-defined]
    kept, index = getattr(weights, "state_dict", weights), getattr(weights, "index", {})
    if name in kept:
        return kept[name]
    about = index[name]
    if about.get("safetensors_file") is not None:
        raise UserError(
            f"{whole} is offloaded to the checkpoint {about['safetensors_file']}, which would be changed: call "
            "accelerate.disk_offload with a folder of its own, or keep it in main memory."
        )
    path, dtype = Path(weights.save_folder) / f"{name}.dat", about["dtype"]  # type: ignore[attr-defined]
    mapped = np.memmap(path, "int16" if dtype == "bfloat16" else dtype, "r+", shape=tuple(about["shape"]) or (1,))
    tensor = torch.from_numpy(mapped)
    return (tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor).view(about["shape"])
