"""Parameter groups in torch's form, of named tensors; one or many closures; the mean loss over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, named_tensors

Closure = Callable[[], Tensor | float]


def listed(closure: Closure | Sequence[Closure] | None) -> Sequence[Closure]:
    return [closure] if callable(closure) else list(closure or ())


def trainable(named: Iterable[tuple[str, Tensor]], group: int) -> list[NamedTensor]:
    named = list(named)
    return named_tensors(named, group) if any(param.requires_grad for _, param in named) else []


def named_groups(params: Iterable) -> list[dict[str, Any]]:
    """Parameter groups of (name, parameter) pairs in which each tensor occurs once."""
    entries = list(params)
    groups = [dict(entry) for entry in entries] if entries and isinstance(entries[0], dict) else [{"params": entries}]
    seen: set[int] = set()
    position = 0
    for group in groups:
        members = group["params"]
        named = []
        for member in [members] if isinstance(members, Tensor) else list(members):
            name, param = member if isinstance(member, tuple) else (f"param.{position}", member)
            position += 1
            if id(param) not in seen:
                seen.add(id(param))
                named.append((name, param))
        group["params"] = named
    return groups


def mean_over_processes(loss: float) -> float:
    """The loss averaged over the processes if torch.distributed runs: one number is all that they exchange."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return loss
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(loss, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return float(total) / torch.distributed.get_world_size()
