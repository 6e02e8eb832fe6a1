"""Means with error bars, and a linear loss on which one step gives the whole estimate."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def assert_mean(samples: Tensor, expected: Tensor, sigmas: float = 5.0) -> None:
    """Every entry of the mean over the first dimension is within that many standard errors of the expected value."""
    error = samples.std(0) / len(samples) ** 0.5
    off = ((samples.mean(0) - expected).abs() / error).max()
    assert off < sigmas, f"a mean is {off:.1f} standard errors from its expectation"
    size = expected.abs().max()
    assert error.max() < 0.2 * size, "too few samples: an estimate of 0 would pass"


class Linear(nn.Module):
    """L = <G, W> + <g, b>, with the gradients G (2, 3) and g (2,) known; float64 by default."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.slopes = {
            "weight": torch.randn(2, 3, generator=generator, dtype=torch.float64),
            "bias": torch.randn(2, generator=generator, dtype=torch.float64),
        }
        self.weight = nn.Parameter(torch.randn(2, 3, generator=generator, dtype=torch.float64).to(dtype))
        self.bias = nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64).to(dtype))

    def forward(self) -> Tensor:
        parts = ((slope * self.get_parameter(name).double()).sum() for name, slope in self.slopes.items())
        return torch.stack(list(parts)).sum()


def estimates(optimizer, model: nn.Module, steps: int, before=None) -> dict[str, Tensor]:
    """The estimates (theta - theta') / lr of that many steps from the same weights; before(step) is called first."""
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found: dict[str, list[Tensor]] = {name: [] for name in start}
    for step in range(steps):
        if before is not None:
            before(step)
        optimizer.step(model)
        for name, parameter in model.named_parameters():
            found[name].append((start[name] - parameter.data) / optimizer.last_step.lr[0])
            parameter.data.copy_(start[name])
    return {name: torch.stack(values) for name, values in found.items()}
