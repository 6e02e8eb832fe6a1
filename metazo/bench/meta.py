"""A step of meta-training against the passes that it needs: two forward passes, and two with backward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metazo.bench.models import Shape, build, lm_loss
from metazo.bench.timing import interleaved, ratios, spread
from metazo.blocks import named_tensors
from metazo.meta.config import MetaConfig
from metazo.meta.loop import MetaRun

PASSES, META = "two forwards, two forward-backwards", "meta-step"


class RandomTokens:
    """A task for MetaRun: one batch of random tokens, for any indices."""

    name = "random tokens"

    def __init__(self, closure: Callable[[], Tensor], batch_size: int):
        self.closure, self.batch_size = closure, batch_size

    def __len__(self) -> int:
        return 2 * self.batch_size

    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        return self.closure()

    def sampled_loss(self, model: nn.Module, indices: Sequence[int], generator: torch.Generator) -> Any:
        return self.closure


def measure(
    size: str,
    shape: Shape,
    *,
    rounds: int = 5,
    seconds: float = 10.0,
    device: str = "cpu",
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Rows of {case, seconds, ratio}, ratio to the bare passes; published objective, with the step of its teacher."""
    model = build(size, "float32", device)
    loss = lm_loss(model, shape)
    config = MetaConfig(
        model=size,
        task=["random"],
        out=Path(),
        objective="published",
        batch_size=shape[0],
        steps=10**6,
        teacher_lr=1e-6,
        restart_every=0,
    )
    run = MetaRun(model, named_tensors(model), [RandomTokens(loss, shape[0])], config)
    cases = {PASSES: lambda: _passes(model, loss), META: run.step}
    samples = interleaved(cases, rounds, seconds=seconds, device=device, tick=tick)
    return [
        {"case": name, "seconds": spread(samples[name]), "ratio": spread(ratios(samples, name, PASSES))}
        for name in cases
    ]


def _passes(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        loss()
        loss()
    for _ in range(2):
        loss().backward()
        for parameter in model.parameters():
            parameter.grad = None
