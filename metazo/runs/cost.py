"""What a step costs, measured: floating-point operations beside those of a forward pass, and memory beside inference."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from metazo.kernels.operations import count_operations


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


def measure(model: nn.Module, optimizer: Any, loss: Callable[[], Tensor]) -> Cost:
    """The cost of the optimizer's steps on a loss; the model's weights are put back.

    The operations of a method that only evaluates losses are those of its forward passes (`forwards_per_step`), because its
    first steps need not be like the others. Memory is of the first two steps, so that state which the first one makes is
    in it.
    """
    device = next(model.parameters()).device
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    own = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])

    def forward() -> None:
        with torch.inference_mode():
            loss()

    forward()  # what is cached is there
    one = count_operations(forward)
    inference = own + _most(forward, device)
    taken = own + _most(lambda: [optimizer.step(loss) for _ in range(2)], device)
    if optimizer.replayable:
        flops = round(one * optimizer.forwards_per_step())
    else:
        flops = count_operations(lambda: optimizer.step(loss))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in kept:
                p.copy_(kept[name])
    return Cost(one, flops, inference, max(taken, inference))


def _most(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that a call holds at once, beyond those there were before it."""
    gc.collect()  # within the call, a collection would count as negative what it frees of another measured call
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says on stderr that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler
    found = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
