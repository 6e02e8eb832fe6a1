"""Models whose weights are divided over the processes of torch.distributed when they are loaded.

transformers divides them: by tensor parallelism, in which the processes divide every matrix product, and by `fully_shard`
(FSDP2), in which each process keeps a part of the weights and gathers those of a layer for its forward pass. The parameters
of such a model are DTensors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.processes import world
from metazo.io.tensorfile import weights_hash


def check(tensor_parallel: int, fsdp: int) -> None:
    """Raises UserError if these numbers do not fit the number of processes."""
    if tensor_parallel * fsdp not in (1, world()):
        raise UserError(
            f"`tensor_parallel` is {tensor_parallel} and `fsdp` {fsdp}, and there {_are(world())}: start torchrun with "
            f"{tensor_parallel * fsdp}, or choose numbers whose product is the number of processes."
        )


def _are(count: int) -> str:
    return "is one process" if count == 1 else f"are {count} processes"


def loading(tensor_parallel: int, fsdp: int, config: Any, name: str) -> dict[str, Any]:
    """The arguments of `from_pretrained` that divide a model of this configuration; none for a model that is not divided.

    Raises UserError for a number of attention heads that the processes cannot divide.
    """
    if tensor_parallel * fsdp == 1:
        return {}
    if (
        tensor_parallel > 1 and fsdp > 1
    ):  # each process would warn that parts are gathered in two operations instead of one
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    for heads in ("num_attention_heads", "num_key_value_heads"):
        if (count := getattr(config.get_text_config(), heads, None)) and count % tensor_parallel:
            raise UserError(
                f"`tensor_parallel` is {tensor_parallel} and {name} has {heads} {count}: choose a number that divides it."
            )
    try:
        with needs("llm"):
            from transformers.distributed import DistributedConfig  # type: ignore[attr-defined]
        return {"distributed_config": DistributedConfig(tp_size=tensor_parallel, fsdp_size=fsdp)}
    except (ImportError, TypeError) as error:
        raise UserError("`tensor_parallel` and `fsdp` need transformers 5.23 or later: upgrade it.") from error


def divided(model: nn.Module) -> bool:
    """Whether some parameter is divided over processes."""
    return any(hasattr(parameter, "placements") for parameter in model.parameters())


def whole(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every parameter. Parts are gathered, one tensor at a time: all processes go through all of them.
    A parameter that is not divided is given as it is.
    """
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().full_tensor() if hasattr(parameter, "placements") else parameter  # type: ignore[operator]


def held(model: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Name, values that this process holds, and number of processes that hold the same ones, of every parameter; nothing is
    gathered."""
    everywhere = world() if divided(model) else 1
    for name, parameter in model.named_parameters():
        values, parts = parameter.detach(), 1
        if hasattr(parameter, "placements"):
            mesh, values = parameter.device_mesh, values.to_local()  # type: ignore[attr-defined, operator]
            placements = enumerate(parameter.placements)  # type: ignore[attr-defined]
            parts = math.prod(mesh.size(axis) for axis, how in placements if not how.is_replicate())
        yield name, values, everywhere // parts


def held_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that this process holds."""
    held = [p.to_local() if hasattr(p, "placements") else p for p in model.parameters()]  # type: ignore[operator]
    return sum(part.numel() * part.element_size() for part in held)


def hash_of(model: nn.Module) -> str:
    """`weights_hash` of all parameters, the same whether the model is divided or not. All processes call it."""
    return weights_hash(whole(model), at_once=not divided(model))


def forward_only(model: nn.Module) -> AbstractContextManager:
    """Inference mode; for a divided model no_grad, because `fully_shard` cannot gather weights under inference mode."""
    return torch.no_grad() if divided(model) else torch.inference_mode()
