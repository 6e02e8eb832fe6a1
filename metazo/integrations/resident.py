"""The parameters of a model that is sharded over processes or offloaded, each where its numbers are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metazo.blocks import Local, LocalShard
from metazo.errors import UserError


def local_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of every parameter, to be given to an optimizer instead of `model.named_parameters()`:

        fully_shard(model)                                           # or accelerate.dispatch_model, cpu_offload, disk_offload
        optimizer = metazo.MeZO(local_parameters(model), lr=1e-6)

    * A parameter that is a DTensor is a `LocalShard`: the entries of this process, in the same memory. `fully_shard` (FSDP2)
      makes such parameters, and so do tensor parallelism by `parallelize_module` or transformers (5.23, `DistributedConfig`
      with tp_size) and both together. Each process makes the noise of its own entries, so that the weights are those of a
      model that is not sharded, bit for bit, if the losses are. All processes of a tensor-parallel group must evaluate the
      same batch; the mean of the losses over all processes is then the loss over the batches.
    * `reshard_after_forward` is turned on in every module of `fully_shard`, because a forward pass would otherwise use the
      rows that it gathered before the probe.
    * A parameter that accelerate offloads to main memory is the tensor there, and one that it offloads to disk is its file in
      the offload folder, mapped into memory and changed in place. The forward pass loads what is there.
    * All other parameters are given as they are.

    A tied parameter comes once. The optimizer's state is that of this process's shards: each process saves and loads its own.
    Raises UserError for partial sums, for shards whose places are not known, for weights that accelerate reads from a
    checkpoint, which must not change, for tied weights on disk, which are several files, and for a tie that was cut when the
    model was divided. A process that is killed leaves a probe in the offload folder: do not use the folder again.
    """
    _check_cut(model)
    _reshard(model)
    _check_cut(model)  # a tie that came too late for torch is cut again
    _check_plan(model)
    offloaded = dict(_offloaded(model))
    _check_ties(offloaded)
    found, seen = [], set()
    for name, parameter in model.named_parameters():
        if name in offloaded:
            local: nn.Parameter = offloaded[name]
        elif parameter.requires_grad and hasattr(parameter, "placements"):
            local = _shard(name, parameter)
        else:
            local = parameter
        key = (local.data_ptr(), local.shape) if local.numel() and name in offloaded else id(parameter)
        if key not in seen:
            seen.add(key)
            found.append((name, local))
    return found


def _reshard(model: nn.Module) -> None:
    """Have every module of `fully_shard` gather its shards in each forward pass again.

    The first time that a module is gathered, torch may give its shards other memory, if they were loaded after `fully_shard`.
    Here this comes before their addresses are taken.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(True, recurse=False)
        module.unshard()
        module.reshard()
    if sharded:
        _join_ties(model, sharded)


def _join_ties(model: nn.Module, sharded: Iterable[Any]) -> None:
    """Have weights that were tied after `fully_shard`, as transformers ties them, be gathered from the same memory.

    torch has a record of such a weight for each module that uses it. If the processes have unequal parts, each record copies
    its part into padded memory of its own, and the forward pass of one module would not see changes of the weight.
    Raises UserError if this version of torch does not show its records.
    """
    records: dict[int, list[Any]] = {}
    for module in sharded:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for record in (record for group in groups for record in getattr(group, "fsdp_params", ())):
            if hasattr(record, "sharded_param") and hasattr(record, "_sharded_param_data"):
                records.setdefault(id(record.sharded_param), []).append(record)
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        if uses[id(parameter)] > 1 and _unequal(parameter):
            found, local = records.get(id(parameter), []), parameter.to_local()  # type: ignore[operator]
            held = [record._sharded_param_data for record in found if _together(record._sharded_param_data, local)]
            if not held:
                raise UserError(
                    f"{name} is tied, its {parameter.shape[0]} rows are divided into unequal parts, and torch "
                    f"{torch.__version__} does not show where it gathers them: take a number of processes that divides them, "
                    "or torch 2.13."
                )
            for record in found:
                record._sharded_param_data = held[0]


def _together(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _unequal(parameter: Any) -> bool:
    """Whether processes have unequal parts of a DTensor."""
    if not hasattr(parameter, "placements"):
        return False
    divided = zip(parameter.placements, parameter.device_mesh.shape)
    return any(placement.is_shard() and parameter.shape[placement.dim] % count for placement, count in divided)


def _check_cut(model: nn.Module) -> None:
    """Raises UserError if two trained matrices are tied according to transformers, and were divided each by itself."""
    held: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for one, other in ((first, name) for name, first in ties.items() if {first, name} <= held.keys()):
        pair = (held[one], held[other])
        apart = pair[0] is not pair[1] and any(hasattr(parameter, "placements") for parameter in pair)
        if apart and all(parameter.requires_grad for parameter in pair):
            raise UserError(
                f"{one} and {other} are tied, and dividing the model has made two matrices of them, to be trained apart: "
                "call model.tie_weights() after parallelize_module, with both modules in its plan, or give both to one call of "
                "fully_shard, as a list."
            )


def _check_plan(model: nn.Module) -> None:
    """Raises UserError for parts of weights, made by transformers, that do not say which entries they are.

    Early versions 5 of transformers made plain tensors under tensor parallelism; version 5.23 makes DTensors.
    """
    parallel = (getattr(model, "_tp_size", None) or 1) > 1
    plan: dict[str, str] = (parallel and getattr(model, "_tp_plan", None)) or {}
    for name, parameter in model.named_parameters():
        module = re.sub(r"\.\d+(?=\.)", ".*", name.rpartition(".")[0])
        divided = parameter.ndim > 1 and "wise" in plan.get(module, "") and not hasattr(parameter, "placements")
        if divided and parameter.requires_grad:
            raise UserError(
                f"transformers keeps a part of {name} on each process ({plan[module]}) as a plain tensor, so that its place in "
                "the whole tensor is not known: use transformers 5.23 or later, whose parts are DTensors, or freeze it."
            )


def _shard(name: str, parameter: Any) -> nn.Parameter:
    """This process's entries of a DTensor."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh, placements = parameter.device_mesh, parameter.placements
    here = mesh.get_coordinate()  # None if this process is not on the mesh
    local = parameter.to_local().detach()
    places = [np.arange(size) for size in parameter.shape]
    for dimension, placement in enumerate(placements):
        if type(placement) in (Shard, _StridedShard) and here is not None:
            stretches = _pieces(places[placement.dim], getattr(placement, "split_factor", 1))
            parts = [_pieces(stretch, mesh.size(dimension))[here[dimension]] for stretch in stretches]
            places[placement.dim] = np.concatenate(parts)
        elif type(placement) is not Replicate:
            raise UserError(
                f"{name} is placed as {placements} on {mesh}, and only shards and replicas on the processes of the mesh can be "
                "trained: distribute it as Shard or Replicate, or freeze it."
            )
    if local.shape != tuple(map(len, places)) or not local.is_contiguous():
        raise UserError(
            f"{name} has {tuple(local.shape)} of {tuple(parameter.shape)} entries on this process, in another order than "
            f"{placements} says: distribute it with torch's distribute_tensor, or freeze it."
        )
    if all(type(placement) is Replicate for placement in placements):
        held = Local(local, parameter.requires_grad)
    else:
        held = LocalShard(local, parameter.requires_grad, places, parameter.shape)  # type: ignore[call-arg]
    held.source = parameter
    return held


def _pieces(places: np.ndarray, count: int) -> list[np.ndarray]:
    """Cut as torch.chunk does, with empty pieces at the end if there are too few places."""
    most = -(-len(places) // count)
    return [places[k * most : (k + 1) * most] for k in range(count)]


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
                    held = Local(stored.detach(), parameter.requires_grad)
                    held.home = partial(module.get_parameter, name)  # accelerate makes a new one in each forward pass
                    yield whole, held


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
