"""Check that the processes of torch.distributed take the same steps, because they exchange only their losses.

Each process perturbs and updates its own copy of the weights, so seeds, settings and weights must be the same on all.
Every `check_every` steps, and at the first, each process sends its settings and one checksum per trained tensor. It costs
one pass over the weights, about as much as one update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.errors import UserError

Chunks = Callable[[NamedTensor], Iterable[tuple[int, Tensor]]]
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(chunks: Iterable[tuple[int, Tensor]]) -> int:
    """The sum of the bits of all entries, each times an odd number that depends on its position, modulo 2^64."""
    total = 0
    for start, chunk in chunks:
        bits = chunk.contiguous().view(-1).view(_BITS[chunk.element_size()]).to(torch.int64)
        place = torch.arange(start, start + len(bits), device=bits.device).mul_(2).add_(1)
        total += int((bits * place).sum())
    return total % 2**64


def together() -> bool:
    """Whether there are several processes."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def check_ranks(optimizer: Any) -> None:
    """Raises UserError on every rank if seeds, settings or trained weights differ between ranks."""
    mine = described(optimizer)
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    for rank, other in enumerate(every):
        if difference := first_difference(every[0], other):
            raise UserError(
                f"Rank {rank} takes other steps than rank 0: {difference}. Give every rank the same seed, settings and start "
                "weights (load the same checkpoint), or set `check_every=0` if they are to differ."
            )


def described(optimizer: Any) -> dict[str, Any]:
    """Everything that must be equal on all ranks, by name; "weights" has a checksum per trained tensor."""
    plain = {
        key: value
        for key, value in vars(optimizer).items()
        if not key.startswith("_") and key != "forwards" and isinstance(value, bool | int | float | str)
    }
    groups = [{key: group.get(key) for key in ("lr", "weight_decay")} for group in optimizer.param_groups]
    parts = {"method": optimizer.name, "seed": optimizer.noise.run_seed, "noise": optimizer.noise.name}
    parts |= {"rule": repr(optimizer.rule), "scale": type(optimizer.scale).__name__, "parameter groups": str(groups)}
    return parts | plain | {"weights": {t.name: checksum(optimizer.weights.read(t)) for t in optimizer.tensors}}


def first_difference(first: dict[str, Any], other: dict[str, Any]) -> str:
    """The first difference in words; empty if there is none."""
    for key in [*first, *(key for key in other if key not in first)]:
        if first.get(key) == other.get(key):
            continue
        if key != "weights":
            return f"{key} is {other.get(key)} there and {first.get(key)} on rank 0"
        here, there = first[key], other[key]
        if list(here) != list(there):
            return f"it trains {len(there)} tensors and rank 0 trains {len(here)}, under other names"
        names = [name for name in here if here[name] != there[name]]
        return f"{len(names)} of {len(here)} trained tensors have other values, the first is {names[0]}"
    return ""
