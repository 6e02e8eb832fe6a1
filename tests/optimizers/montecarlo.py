"""Means with error bars, and a linear loss on which one step gives the whole estimate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metazo.step.terms import Along


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


def linear_estimates(optimizer, model: Linear, steps: int, taken: int = 10) -> dict[str, Tensor]:
    """As `estimates`, in a third of the time: from the method's own seeds, directions and coefficients, at losses worked out
    from the slopes. The first steps are taken as well, and must give these estimates.
    """
    first = optimizer.steps
    steps_taken = estimates(optimizer, model, taken)
    base, found = float(model().detach()), []
    for step in range(first, first + steps):
        estimator = optimizer.estimator_for(optimizer.zo_state, step)
        state, seeds = optimizer.zo_state, optimizer.draw_seeds(step, estimator.queries)
        proposed = optimizer.propose(state, step, seeds)
        scale = optimizer.scale
        along = Along(proposed, scale and scale.scales(state, step, optimizer.weights.whole))
        streams = {seed: optimizer.noise.stream(seed) for seed in seeds}

        def draw(direction, seed):
            return torch.cat([direction.draw(streams[seed], tensor).flatten() for tensor in optimizer.tensors])

        slopes = torch.cat([model.slopes[tensor.name].flatten() for tensor in optimizer.tensors])
        drawn = {seed: draw(along.probed, seed) for seed in seeds}
        rises = {seed: float(d @ slopes) for seed, d in drawn.items()}
        probes = optimizer.displacements(estimator, along.probed, seeds)
        losses = [base + sum(term.amount * rises[term.seed] for term in probe) for probe in probes]
        update = optimizer.update(state, step, seeds, losses)
        terms = along.estimate(seeds, update.coefficients, update.terms)
        found.append(
            sum(t.amount * (drawn[t.seed] if t.direction is along.probed else draw(t.direction, t.seed)) for t in terms)
        )
    parts = torch.stack(found).split([tensor.param.numel() for tensor in optimizer.tensors], 1)
    whole = {t.name: part.view(-1, *t.param.shape) for t, part in zip(optimizer.tensors, parts, strict=True)}
    for name, values in steps_taken.items():
        torch.testing.assert_close(whole[name][:taken], values, rtol=1e-7, atol=1e-8)
    return whole
