"""What a step costs, measured: floating-point operations beside those of a forward pass, and memory beside inference."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from metazo.kernels.operations import count_operations

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Cost:
    """forward_flops, step_flops: operations of matrix products and attention in a forward pass and in a step, over the same
    batch (frozen layers whose outputs are cached take none); inference_bytes, step_bytes: most tensor memory during a
    forward pass and during steps, the model's own included.
    """

    forward_flops: int
    step_flops: int
    inference_bytes: int
    step_bytes: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def measure(model: nn.Module, optimizer: Any, loss: Callable[[], Tensor], accumulate: int = 1) -> Cost:
    """The cost of the optimizer's steps on a loss, evaluated `accumulate` times for each; the model's weights are put back.

    The operations of a method that only evaluates losses are those of its forward passes (`forwards_per_step`), because its
    first steps need not be like the others. Memory is of the first two steps, with the state that the optimizer holds before
    them or makes in them.
    """
    device = next(model.parameters()).device
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    own = sum(map(_bytes, [*model.parameters(), *model.buffers()]))
    there = getattr(
        optimizer, "_ready", True
    )  # else the first step makes it, and what it takes beside it is counted too
    state = sum(map(_bytes, optimizer.tensors_state().values())) if there else 0

    def forward() -> None:
        with torch.inference_mode():
            loss()

    forward()  # what is cached is there
    one = count_operations(forward)
    inference = own + most_bytes(forward, device)
    losses = [loss] * accumulate
    taken = own + state + most_bytes(lambda: [optimizer.step(losses) for _ in range(2)], device)
    if optimizer.replayable:
        flops = round(one * optimizer.forwards_per_step(accumulate))
    else:
        flops = count_operations(lambda: optimizer.step(losses))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in kept:
                p.copy_(kept[name])
    return Cost(one, flops, inference, max(taken, inference))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def most_bytes(call: Callable[[], Any], device: torch.device = CPU) -> int:
    """Most bytes of tensors that a call holds at once, of those that it makes itself."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says on stderr that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler
    sizes: dict[int, int] = {}
    held = most = 0
    for event in sorted(_allocations(results.kineto_results.experimental_event_tree()), key=lambda e: e.start_time_ns):
        place, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            sizes[place] = size
            held += size
        else:  # of a tensor from before the call, the profiler may know the size of another one that was there
            held -= sizes.pop(place, 0)
        most = max(most, held)
    return most


def _allocations(events: Sequence[Any]) -> Iterator[Any]:
    """The allocations and releases among the events of a profile, in any order."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.name == "[memory]":
            yield event
