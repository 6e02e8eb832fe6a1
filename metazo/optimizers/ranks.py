"""What the processes of torch.distributed exchange in a step, and the check that they take the same steps.

Each process perturbs and updates its own copy of the weights, so that the losses are all that they need of each other. Of N
processes, Q = `probe_ranks` divide the probes of a step, and N / Q divide its examples: rank r evaluates the probes
r mod Q, r mod Q + Q, ... on share r div Q of the examples. It sends one vector, of 8 bytes per probe and 8 more: its losses, 0
for the probes of others, and whether it was asked to stop. One all-reduce gives the sum over the processes, and the losses
are this sum times Q / N. With Q = N they are, bit for bit, those of a single process, because every other summand is 0.

Seeds, settings and weights must be the same on all processes. Every `check_every` steps, and at the first, they compare one
hash of all of them; if it differs, they compare one checksum per trained tensor, to say what differs. This costs one pass
over the weights, about as much as one update. What the exchange itself depends on, the number of losses and `check_every`, is
compared once, before the first step, also if `check_every` is 0: otherwise processes would wait for each other for nothing, or
torch would end one of them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from metazo.blocks import LocalShard, checksum
from metazo.errors import UserError
from metazo.io import processes

UNEQUAL = ("forwards", "defer")
"""Attributes of an optimizer that may differ between processes, because no bit of a step depends on them."""


def share(probe_ranks: int) -> tuple[int, int]:
    """(index, number) of this process's share of the examples. Raises UserError if `probe_ranks` does not divide them."""
    count = processes.world()
    if count == 1:
        return 0, 1
    if count % probe_ranks:
        raise UserError(
            f"`probe_ranks` is {probe_ranks} and there are {count} processes: choose a number that divides {count}."
        )
    return processes.rank() // probe_ranks, count // probe_ranks


class Exchange:
    """The exchange of a step's losses.

    Args: probe_ranks: the number of processes that divide the probes of a step; the others divide its examples.
    Attributes: stop, to be set if this process was asked to stop; stopped, whether one of them was at the last exchange.
    """

    def __init__(self, probe_ranks: int = 1):
        if not isinstance(probe_ranks, int) or isinstance(probe_ranks, bool) or probe_ranks < 1:
            raise UserError(f"`probe_ranks` must be a whole number of at least 1, not {probe_ranks}.")
        self.probe_ranks = probe_ranks
        self.stop = self.stopped = False

    def check(self, probes: int) -> None:
        """Raises UserError if `probe_ranks` does not divide the processes, or if some would have no probe to evaluate."""
        share(self.probe_ranks)
        if processes.together() and self.probe_ranks > probes:
            raise UserError(
                f"`probe_ranks` is {self.probe_ranks} and the number of probes per step is {probes}: lower it."
            )

    def owns(self, probe: int) -> bool:
        """Whether this process evaluates that probe of a step."""
        return not processes.together() or (processes.rank() - probe) % self.probe_ranks == 0

    def combined(self, losses: Sequence[float]) -> list[float]:
        """The losses on all examples, from those of this process, which are 0 for probes that it does not own."""
        if not processes.together():
            self.stopped = self.stop
            return list(losses)
        _, shares = share(self.probe_ranks)
        *sums, stops = processes.total([*losses, float(self.stop)])
        self.stopped = stops > 0
        return [value / shares for value in sums]


def check_exchange(optimizer: Any) -> None:
    """Raises UserError on every rank if they would not exchange the same numbers in a step; warns about names of
    DistributedDataParallel, which give another noise than the model's own.
    """
    if all(tensor.name.startswith("module.") for tensor in optimizer.tensors):
        warnings.warn(
            "All names of the weights begin with `module.`, as those of DistributedDataParallel, and the noise follows from "
            "the names: give the optimizer the parameters of the model inside (`model.module`, or the model before "
            "`accelerator.prepare`) for the steps that one process would take.",
            stacklevel=4,
        )
    mine = {"check_every": optimizer.check_every, "probes per step": len(optimizer.estimator.probes())}
    _refuse(processes.gathered(mine), "Give every rank the same settings.")


def check_ranks(optimizer: Any) -> None:
    """Raises UserError on every rank if seeds, settings or trained weights differ between ranks."""
    mine = described(optimizer)
    digest = blake2b(json.dumps(mine).encode(), digest_size=16).digest()
    if len(set(processes.gathered(digest))) == 1:
        return
    _refuse(
        processes.gathered(mine),
        "Give every rank the same seed, settings and start weights (load the same checkpoint), or set `check_every=0` if they "
        "are to differ.",
    )


def _refuse(every: Sequence[dict[str, Any]], remedy: str) -> None:
    for rank, other in enumerate(every):
        if difference := first_difference(every[0], other):
            error = UserError(f"Rank {rank} takes other steps than rank 0: {difference}. {remedy}")
            error.shared = True
            raise error


def shown(part: Any) -> str:
    """The settings of a rule or an estimator; of one from elsewhere that does not show them, the name of its class, because
    Python's own text has its address, which differs between processes."""
    return type(part).__qualname__ if type(part).__repr__ is object.__repr__ else repr(part)


def described(optimizer: Any) -> dict[str, Any]:
    """Everything that must be equal on all ranks, by name; "weights" has a checksum per trained tensor that is
    not sharded."""
    plain = {
        key: value
        for key, value in vars(optimizer).items()
        if not key.startswith("_") and key not in UNEQUAL and isinstance(value, bool | int | float | str)
    }
    groups = [{key: float(group[key]) for key in ("lr", "weight_decay")} for group in optimizer.param_groups]
    parts = {"method": type(optimizer).__qualname__, "seed": optimizer.noise.run_seed, "noise": optimizer.noise.name}
    parts |= {"estimator": shown(optimizer.estimator), "rule": shown(optimizer.rule), "parameter groups": str(groups)}
    parts |= {"scale": "none" if optimizer.scale is None else optimizer.scale.identity()}
    if optimizer.scale is not None:  # they follow from shards too
        parts |= {"the hash of the block scales": checksum([(0, optimizer.zo_state["scale/sigma"])])}
    whole = [tensor for tensor in optimizer.tensors if not isinstance(tensor.param, LocalShard)]
    weights = {tensor.name: checksum(optimizer.weights.read(tensor)) for tensor in whole}
    parts |= {"probe_ranks": optimizer.exchange.probe_ranks}
    return parts | plain | {"weights": weights}


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
