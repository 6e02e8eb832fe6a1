"""Block scales: one perturbation scale sigma_b per block, from a rule or from a tuner's networks.

The direction becomes d_b = kappa sigma_b z_b with kappa = sqrt(sum D_b / sum D_b sigma_b^2), D_b the entries of block
b, so that the expected squared length of the perturbation is that of plain noise and a learning rate keeps its meaning
(arXiv 2510.00419, normalisation). All state is tensors by name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metazo.blocks import Block, NamedTensor, partition, shape_of
from metazo.errors import UserError
from metazo.io.processes import from_first

State = dict[str, Tensor]
Theta = Callable[[NamedTensor], Iterable[tuple[int, Tensor]]]
"""The weights of a whole tensor, in chunks: (start, entries)."""

STATISTICS_EVERY = 50  # steps; sigma moves by 0.07% (RMS), 0.8% (tuner) in the mean: benchmarks/statistics_every.py
_RUN = 1 << 18  # entries
NO_LOSSES = (0.0, 0.0, -math.inf)  # of the steps before the first
RMS_FLOOR = 0.01  # times the rms over all weights: a block of zeros (a new bias) must be able to move
ZEROS = 0.1  # share of the entries from which blocks of zeros are more than new biases


def block_statistics(blocks: Sequence[Block], theta: Theta) -> Tensor:
    """Mean, unbiased variance and root mean square of each block's entries. Returns: (blocks, 3), float64."""
    rows = []
    for block in blocks:
        parts = [part for tensor in block.tensors for _, values in theta(tensor) for part in _moments(values)]
        count = sum(n for n, _, _ in parts)
        mean = sum(n * m for n, m, _ in parts) / count
        spread = sum(n * (v + (m - mean) ** 2) for n, m, v in parts)  # sum of squared deviations of the whole block
        rows.append((mean, spread / max(count - 1, 1), math.sqrt(mean**2 + spread / count)))
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _moments(values: Tensor) -> Iterator[tuple[int, float, float]]:
    """Number, mean and mean square deviation of short parts of the entries.

    Parts that fit the cache take a fifth of the time of torch.var_mean on one core.
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

    root: the numerator, if it is to be rounded as in the published code (`published_root`).
    """
    return (torch.sqrt(counts.sum()) if root is None else root) / torch.sqrt((counts * sigma**2).sum())


def published_root(counts: Tensor) -> Tensor:
    """sqrt(sum D_b) as in the published meta-training: D_b in millions, summed and rooted in float32."""
    total = torch.zeros((), dtype=torch.float32, device="cpu")
    for count in counts.tolist():
        total += count / 1e6
    return total.sqrt().double() * 1e3


def entry_counts(blocks: Sequence[Block], embedding_rows: int | None = None) -> Tensor:
    """D_b by block, float64. embedding_rows: entries of a tensor whose name contains `embed` count as rows * columns.

    The published code uses rows = 15 * batch size * processes, an estimate of the rows that a batch touches.
    """

    def count(tensor: NamedTensor) -> int:
        shape = shape_of(tensor.param)
        if embedding_rows is not None and "embed" in tensor.name and len(shape) > 1:
            return embedding_rows * shape[1]
        return shape.numel()

    return torch.tensor(
        [sum(count(tensor) for tensor in block.tensors) for block in blocks], dtype=torch.float64, device="cpu"
    )


@dataclass
class BlockScale:
    """Base of block scales. Subclasses give `sigma(statistics, state)`, (blocks,).

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
        """Set the tensors to scale; the optimizer calls it once. Raises UserError for `every` below 1."""
        if not isinstance(self.every, int) or self.every < 1:
            raise UserError(f"`every` of a scale must be a whole number of at least 1, not {self.every!r}.")
        self.blocks = partition(tensors, self.by)
        self.counts = entry_counts(self.blocks, self.embedding_rows)

    def init(self) -> State:
        """The last step's losses (L+, L-, and their mean the step before, -inf if there was none) and scales."""
        return {
            "scale/losses": torch.tensor(NO_LOSSES, dtype=torch.float64, device="cpu"),
            "scale/sigma": torch.ones(len(self.blocks), dtype=torch.float64, device="cpu"),
            "scale/statistics": torch.zeros(len(self.blocks), 3, dtype=torch.float64, device="cpu"),
        }

    def sigma(self, state: State) -> Tensor:
        raise TypeError("BlockScale itself has no scales: use RMSScale or TunerScale.")

    def scales(self, state: State, step: int, theta: Theta) -> dict[str, float]:
        """kappa sigma_b by tensor name for this step; updates the state. Processes take the statistics of rank 0; all must
        call it. Raises UserError if one is not finite, or if `sigma` is not one per block.
        """
        if step % self.every == 0:
            found = block_statistics(self.blocks, theta)  # on all processes, because theta may be gathered from them
            state["scale/statistics"].copy_(from_first(lambda: found))  # sums follow the number of threads
        if step == 0 and self.of_rms:
            self._warn_of_zeros(state["scale/statistics"][:, 2])
        sigma = self.sigma(state)
        if sigma.shape != self.counts.shape:
            raise UserError(
                f"`sigma` of {type(self).__name__} has the shape {tuple(sigma.shape)}, and there are {len(self.blocks)} "
                "blocks: return a scale for each."
            )
        state["scale/sigma"].copy_(sigma)
        scaled = (sigma * normalisation(sigma, self.counts) if self.normalise else sigma).tolist()
        for block, value in zip(self.blocks, scaled):
            if not math.isfinite(value):
                raise UserError(
                    f"The scale of block {block.name} is not finite at step {step}, after losses of "
                    f"{' and '.join(f'{loss:g}' for loss in state['scale/losses'][:2].tolist())}; the weights were not moved. "
                    "Networks of float16 overflow at losses above 65504, and networks that give only 0 have no direction: "
                    "choose another tuner or `scale`."
                )
        return {tensor.name: value for block, value in zip(self.blocks, scaled) for tensor in block.tensors}

    @property
    def of_rms(self) -> bool:
        """Whether the scale of a block follows the size of its weights."""
        return False

    def _warn_of_zeros(self, rms: Tensor) -> None:
        """Say that much of what is trained is zero, as half of LoRA's factors is: a step along a block goes with sigma_b^2."""
        zeros = [block for block, size in zip(self.blocks, rms.tolist()) if size == 0]
        share = float(self.counts[rms == 0].sum() / self.counts.sum())
        if ZEROS < share < 1:
            warnings.warn(
                f"{len(zeros)} of the {len(self.blocks)} trained blocks are zeros, the first is {zeros[0].name}, and hold "
                f"{share:.0%} of the entries. The scale follows the size of weights and probes these by {RMS_FLOOR:.0%} of the "
                "rms of all, so that they hardly learn. LoRA's factors begin in this way: leave `scale` out for them.",
                stacklevel=6,  # the caller of `step`
            )

    def identity(self) -> str:
        """The settings in one line; scales with another line differ."""
        return repr(self)

    def observe(self, state: State, plus: float, minus: float) -> None:
        """Store the losses of this step for the next."""
        before = tuple(state["scale/losses"].tolist())
        mean = NO_LOSSES[2] if before == NO_LOSSES else (before[0] + before[1]) / 2
        state["scale/losses"].copy_(torch.tensor([plus, minus, mean], dtype=torch.float64, device="cpu"))


@dataclass
class RMSScale(BlockScale):
    """sigma_b = RMS(theta_b): each block moves in proportion to the size of its weights. It needs no training.

    Source: none published; measured here (docs/results.md). Blocks below RMS_FLOOR of the whole are raised to it. Do not use it
    for LoRA: half of its factors are zeros at first and hardly learn.
    """

    @property
    def of_rms(self) -> bool:
        return True

    def sigma(self, state: State) -> Tensor:
        return floored_rms(state["scale/statistics"][:, 2], self.counts)
