"""The processes of torch.distributed: who they are, and what they tell each other besides the losses of a step.

Every function gives the same result on all processes, and needs all of them to call it. In a single process none of them
communicates. Objects are sent by pickle, so that the processes must trust each other, as torch.distributed expects.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from metazo.errors import UserError
from metazo.io.plain import shown

T = TypeVar("T")
Tensors = tuple[int, dict[str, Tensor]]
"""A step, and tensors by name."""


_MET: dict[tuple[str | None, ...], tuple[Any, Iterator[int]]] = {}
"""By address: the store of the processes, with rank and world size, and the numbers of further meetings there. Each meeting has
keys of its own in the store, because a process could find those of a meeting that is over, and wait for it forever."""


class LostRank(UserError):
    """Another process ended, or did not answer in time."""


def together() -> bool:
    """Whether there are several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    return distributed.get_rank() if together() else 0


def world() -> int:
    """The number of processes."""
    return distributed.get_world_size() if together() else 1


def launched() -> int:
    """The number of processes that torchrun or accelerate launch started, from the environment; 1 if neither did."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if "RANK" in os.environ and size.isdigit() else 1


@contextmanager
def joined(timeout: float, *, tensors: bool = False) -> Iterator[None]:
    """Meet the other processes that torchrun started, over gloo, for the length of the context.

    It does nothing for a single process, or if the caller has met them already. timeout: seconds without an answer after
    which a process counts as lost. tensors: whether a forward pass exchanges tensors, which NCCL sends between GPUs. A
    UserError that is raised on this process alone gets its rank as `of_rank`.
    """
    own = launched() > 1 and not distributed.is_initialized()
    if own:
        backend = "gloo"
        if tensors and torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        _meet(backend, timeout)
    try:
        with _groups_wait(timeout) if own else nullcontext():
            yield
    except UserError as error:
        if rank() and not error.shared:
            error.of_rank = rank()
        raise
    finally:
        if own:
            with suppress(RuntimeError):
                distributed.destroy_process_group()


def _meet(backend: str, timeout: float) -> None:
    """Raises UserError, with the rank of this process, if the processes cannot meet."""
    from torch.distributed.distributed_c10d import PrefixStore  # not in every build of torch
    from torch.distributed.rendezvous import rendezvous

    limit = timedelta(seconds=timeout)
    where = tuple(map(os.environ.get, ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")))
    try:
        if where not in _MET:
            _MET[where] = next(rendezvous("env://", timeout=limit)), count()
        (store, own, size), times = _MET[where]
        store.set_timeout(limit)
        store = PrefixStore(f"metazo/{next(times)}", store)
        distributed.init_process_group(backend, store=store, rank=own, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:  # ValueError: the environment lacks something
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        why = f"{error}; start them with torchrun or accelerate launch"
        if "EADDRINUSE" in why:
            why = "another program uses the port: give torchrun another --master-port"
        elif _late(error):
            why = f"there was no answer within {timeout:g} seconds: look at the messages of the others"
        found = UserError(f"The processes of this run cannot meet at {address} (MASTER_ADDR, MASTER_PORT): {why}.")
        found.of_rank = int(named) if (named := os.environ["RANK"]).isdigit() else 0
        raise found from error


@contextmanager
def _groups_wait(seconds: float) -> Iterator[None]:
    """Groups of processes that are made within the context, as the meshes of a divided model make them, wait as long as given:
    by torch's default they wait 30 minutes, however long the processes as a whole do.
    """
    module, limit = distributed.distributed_c10d, timedelta(seconds=seconds)
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(module, name) for name in names}
    vars(module).update(dict.fromkeys(names, limit))
    try:
        yield
    finally:
        vars(module).update(before)


@contextmanager
def _answered() -> Iterator[None]:
    """Turn the failure of an exchange into LostRank."""
    try:
        yield
    except RuntimeError as error:
        raise lost(error) from error


def lost(error: RuntimeError) -> LostRank:
    """What the failure of an exchange means."""
    what = "did not answer in time" if _late(error) else "has ended"
    found = LostRank(f"Another process of this run {what}, so that this one cannot go on.")
    found.shared = True
    return found


def _late(error: Exception) -> bool:
    return any(word in str(error).lower() for word in ("timed out", "timeout"))


def total(values: Sequence[float]) -> list[float]:
    """The sum over the processes of each number, in float64: one all-reduce of 8 bytes per number."""
    if not together():
        return list(values)
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    with _answered():
        distributed.all_reduce(sums)
    return sums.tolist()


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if not together():
        return [value]
    found: list[Any] = [None] * world()
    with _answered():
        distributed.all_gather_object(found, value)
    return found


def from_first(compute: Callable[[], T]) -> T:
    """The value that rank 0 computes, or the UserError that it raises."""
    if not together():
        return compute()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = compute()
        except UserError as error:
            outcome[1] = error
    with _answered():
        distributed.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise of_all(outcome[1])
    return outcome[0]


def tensors_from_first(compute: Callable[[], Tensors | None]) -> Tensors | None:
    """As `from_first`, for tensors, which are sent one by one."""
    held: list[Tensors | None] = [None]

    def outline() -> tuple[int, dict[str, tuple[torch.Size, torch.dtype]]] | None:
        held[0] = compute()
        return held[0] and (held[0][0], {name: (t.shape, t.dtype) for name, t in held[0][1].items()})

    found = from_first(outline)
    if found is None or not together():
        return held[0]
    step, shapes = found
    own = held[0][1] if held[0] else {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    for tensor in own.values():
        with _answered():
            distributed.broadcast(tensor.reshape(-1).view(torch.uint8), 0)
    return step, own


def agreed(compute: Callable[[], T]) -> T:
    """The value that this process computes; a UserError on some processes is raised on all of them."""
    if not together():
        return compute()
    value, error = None, None
    try:
        value = compute()
    except UserError as raised:
        error = raised
    failed = [(number, other) for number, other in enumerate(gathered(error)) if other is not None]
    if failed:
        number, other = failed[0]
        raise of_all(other if len(failed) == world() else UserError(f"On rank {number}: {other}"))
    return value  # type: ignore[return-value]


def require_same(what: str, value: Any) -> None:
    """Raises UserError on all processes if the value is not the same on all of them. what: its name, as a plural."""
    if any(other != value for other in gathered(value)):  # true on all processes if on one
        raise of_all(UserError(f"The {what} differ between the processes of this run; give all of them the same."))


def require_same_values(values: Mapping[str, Any], advice: str) -> None:
    """As `require_same`, for single values by what they are called in a message; a value that a process lacks is None."""
    first, *others = gathered(dict(values))
    for number, other in enumerate(others, 1):
        for name in first | other:
            if other.get(name) != first.get(name):
                one, two = shown(first.get(name)), shown(other.get(name))
                raise of_all(UserError(f"{name} is {one} on rank 0 and {two} on rank {number}: {advice}."))


def of_all(error: UserError) -> UserError:
    """An error that every process raises, so that only rank 0 shows it."""
    error.shared = True
    return error
