"""Block scales: one perturbation scale sigma_b a block, from a rule or from a tuner's networks.

The direction becomes d_b = kappa sigma_b z_b with kappa = sqrt(sum D_b / sum D_b sigma_b^2), D_b the entries of block
b, so that the expected squared length of the perturbation is that of plain noise and a learning rate keeps its meaning
(arXiv 2510.00419, normalisation). State is tensors by name; nothing else is remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from metazo.blocks import Block, NamedTensor, partition
from metazo.errors import UserError
from metazo.tuner.networks import PertNN

State = dict[str, Tensor]
Theta = Callable[[NamedTensor], Iterable[tuple[int, Tensor]]]
"""The weights of a tensor, in pieces: (start, entries)."""

STATISTICS_EVERY = 50  # steps; moves sigma by .07 % (RMS), .8 % (tuner) in the mean: benchmarks/statistics_every.py
_RUN = 1 << 18  # entries
RMS_FLOOR = 0.01  # of the rms over all weights: a block of zeros (a fresh bias) must be able to move


def block_statistics(blocks: Sequence[Block], theta: Theta) -> Tensor:
    """Mean, unbiased variance and root mean square of each block's entries. Returns: (blocks, 3), float64."""
    rows = []
    for block in blocks:
        parts = [part for tensor in block.tensors for _, values in theta(tensor) for part in _moments(values)]
        count = sum(n for n, _, _ in parts)
        mean = sum(n * m for n, m, _ in parts) / count
        spread = sum(n * (v + (m - mean) ** 2) for n, m, v in parts)  # sum of squared deviations of the whole block
        rows.append((mean, spread / max(count - 1, 1), math.sqrt(mean**2 + spread / count)))
    return torch.tensor(rows, dtype=torch.float64)


def _moments(values: Tensor) -> Iterator[tuple[int, float, float]]:
    """Number, mean and mean square deviation of runs of the entries.

    Runs that stay in the cache take a fifth of the time of torch.var_mean on one core.
    """
    for run in values.reshape(-1).split(_RUN if values.device.type == "cpu" else max(values.numel(), 1)):
        wide = run.to(torch.promote_types(run.dtype, torch.float32))
        mean = wide.mean()
        wide = wide - mean
        yield len(run), float(mean), float(torch.dot(wide, wide)) / len(run)


def floored_rms(rms: Tensor, counts: Tensor) -> Tensor:
    """Root mean square by block, (blocks,), no less than RMS_FLOOR times that of all entries together."""
    whole = torch.sqrt((counts * rms**2).sum() / counts.sum())
    if not whole > 0:
        return torch.ones_like(rms)
    return rms.clamp(min=RMS_FLOOR * float(whole))


def normalisation(sigma: Tensor, counts: Tensor, root: Tensor | None = None) -> Tensor:
    """kappa = sqrt(sum D_b) / sqrt(sum D_b sigma_b^2), a scalar; differentiable in sigma.

    root: the numerator, where it is rounded as the published code does (`published_root`).
    """
    return (torch.sqrt(counts.sum()) if root is None else root) / torch.sqrt((counts * sigma**2).sum())


def published_root(counts: Tensor) -> Tensor:
    """sqrt(sum D_b) as the published meta-training has it: D_b in millions, summed and rooted in float32."""
    total = torch.zeros((), dtype=torch.float32)
    for count in counts.tolist():
        total += count / 1e6
    return total.sqrt().double() * 1e3


def entry_counts(blocks: Sequence[Block], embedding_rows: int | None = None) -> Tensor:
    """D_b by block, float64. embedding_rows: entries of a tensor whose name contains `embed` count as rows * columns.

    The published code does that with rows = 15 * batch size * processes, for the rows that a batch touches.
    """

    def count(tensor: NamedTensor) -> int:
        if embedding_rows is not None and "embed" in tensor.name and tensor.param.ndim > 1:
            return embedding_rows * tensor.param.shape[1]
        return tensor.param.numel()

    return torch.tensor([sum(count(tensor) for tensor in block.tensors) for block in blocks], dtype=torch.float64)


@dataclass
class BlockScale:
    """What scales share. Subclasses give `sigma(statistics, state)`, (blocks,).

    Args:
        by: blocks by "tensor" or "layer".
        normalise: multiply by kappa.
        every: steps between readings of the block statistics, a pass over the weights (STATISTICS_EVERY).
        embedding_rows: see entry_counts.
    """

    by: str = "tensor"
    normalise: bool = True
    every: int = STATISTICS_EVERY
    embedding_rows: int | None = None

    def bind(self, tensors: Sequence[NamedTensor]) -> None:
        """Learn the tensors; called once by the optimizer."""
        self.blocks = partition(tensors, self.by)
        self.counts = entry_counts(self.blocks, self.embedding_rows)

    def init(self) -> State:
        """The last step's losses (L+, L-, and their mean the step before) and scales."""
        return {
            "scale/losses": torch.zeros(3, dtype=torch.float64),
            "scale/sigma": torch.ones(len(self.blocks), dtype=torch.float64),
            "scale/statistics": torch.zeros(len(self.blocks), 3, dtype=torch.float64),
        }

    def sigma(self, state: State) -> Tensor:
        raise TypeError("BlockScale itself has no scales: use RMSScale or TunerScale.")

    def scales(self, state: State, step: int, theta: Theta) -> dict[str, float]:
        """kappa sigma_b by tensor name for this step; updates the state."""
        if step % self.every == 0:
            state["scale/statistics"].copy_(block_statistics(self.blocks, theta))
        sigma = self.sigma(state)
        state["scale/sigma"].copy_(sigma)
        scaled = (sigma * normalisation(sigma, self.counts) if self.normalise else sigma).tolist()
        return {tensor.name: value for block, value in zip(self.blocks, scaled) for tensor in block.tensors}

    def observe(self, state: State, plus: float, minus: float) -> None:
        """Remember the losses of this step for the next."""
        before = state["scale/losses"].tolist()
        state["scale/losses"].copy_(torch.tensor([plus, minus, (before[0] + before[1]) / 2], dtype=torch.float64))


@dataclass
class RMSScale(BlockScale):
    """sigma_b = RMS(theta_b): each block moves in proportion to its size. Free, and so far the one to beat.

    Source: none published; measured here (docs and README). Blocks below RMS_FLOOR of the whole are raised to it.
    """

    def sigma(self, state: State) -> Tensor:
        return floored_rms(state["scale/statistics"][:, 2], self.counts)


FEATURES = ("published", "log")
PARAMETRISATIONS = ("abs", "rms_exp")


def features(kind: str, state: State) -> Tensor:
    """Inputs of the networks, (blocks, 5), float64.

    "published": mean, variance, L+ and L- of the step before, sigma of the step before (arXiv 2510.00419).
    "log": ln standard deviation, mean / standard deviation, loss, change of loss, ln sigma; all of order one.
    """
    statistics, losses, sigma = state["scale/statistics"], state["scale/losses"], state["scale/sigma"]
    n = len(statistics)
    mean, variance = statistics[:, 0], statistics[:, 1]
    if kind == "published":
        return torch.stack([mean, variance, losses[0].expand(n), losses[1].expand(n), sigma], dim=1)
    deviation = variance.sqrt().clamp(min=1e-8)
    loss = (losses[0] + losses[1]) / 2
    change = torch.where(losses[2] > 0, loss - losses[2], 0.0)
    ratio = (mean / deviation).clamp(-10, 10)
    return torch.stack([deviation.log(), ratio, loss.expand(n), change.expand(n), sigma.clamp(min=1e-8).log()], dim=1)


def parametrise(kind: str, raw: Tensor, rms: Tensor, bound: float) -> Tensor:
    """sigma from the networks' raw outputs, (blocks,).

    "abs": |raw| (published). "rms_exp": rms * exp(b tanh(raw / b)), b = bound: the RMS rule where raw is 0, and never
    further from it than the factor e^b.
    """
    if kind == "abs":
        return raw.abs()
    return rms * torch.exp(bound * torch.tanh(raw / bound))


@dataclass
class TunerScale(BlockScale):
    """sigma_b from one small network a block (PertNN, arXiv 2510.00419).

    Args:
        pertnn: the networks, stacked; evaluated in their own dtype, on the CPU.
        networks: name of the block that each network is for; None: the blocks that are trained, in order. Networks of
            blocks that are not trained rest; trained blocks without a network take the RMS scale, at the level that the
            others have on average.
        features, parametrisation, bound: as in `features` and `parametrise`.
    """

    pertnn: PertNN | None = None
    networks: Sequence[str] | None = None
    features: str = "published"
    parametrisation: str = "abs"
    bound: float = math.log(3)

    def bind(self, tensors: Sequence[NamedTensor]) -> None:
        super().bind(tensors)
        if self.pertnn is None:
            raise UserError("A tuner scale needs the tuner's networks (pertnn).")
        if self.features not in FEATURES or self.parametrisation not in PARAMETRISATIONS:
            raise UserError(f"features {self.features!r} with parametrisation {self.parametrisation!r} is unknown.")
        names = [block.name for block in self.blocks]
        row_of = {name: row for row, name in enumerate(names if self.networks is None else self.networks)}
        if len(row_of) != self.pertnn.blocks:
            raise UserError(f"The tuner has {self.pertnn.blocks} networks for {len(row_of)} blocks.")
        known = [i for i, name in enumerate(names) if name in row_of]
        if not known:
            raise UserError(f"The tuner has no network for any trained block, such as {names[0]!r}.")
        self.known = torch.tensor(known)
        self.rows = torch.tensor([row_of[names[i]] for i in known])

    def raw(self, state: State) -> Tensor:
        """Raw outputs for the trained blocks that have a network; differentiable in the networks' weights."""
        assert self.pertnn is not None
        inputs = features(self.features, state)[self.known].to(self.pertnn.w1.dtype)
        selected = {name: weight[self.rows] for name, weight in self.pertnn.named_parameters()}
        return functional_call(self.pertnn, selected, (inputs,))

    def learned(self, state: State) -> Tensor:
        """sigma of those blocks, float64; differentiable in the networks' weights."""
        rms = floored_rms(state["scale/statistics"][:, 2], self.counts)[self.known]
        return parametrise(self.parametrisation, self.raw(state).double(), rms, self.bound)

    def sigma(self, state: State) -> Tensor:
        rms = floored_rms(state["scale/statistics"][:, 2], self.counts)
        with torch.no_grad():
            learned = self.learned(state)
        if len(self.known) == len(self.blocks):
            return learned
        level = torch.exp((learned.clamp(min=1e-12) / rms[self.known]).log().mean())
        return (rms * level).index_copy(0, self.known, learned)
