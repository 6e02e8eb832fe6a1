"""PertNN: one small network per parameter block, all of them evaluated in one pair of batched matrix products.

Source: "ZO Fine-tuner" (arXiv 2510.00419). Each block b has its own Linear(features, hidden) - Tanh - Linear(hidden, 1)
that maps statistics of the block and the last losses to the scale of its perturbation.

Differences from the published code: the networks are stacked, so that 291 of them cost one call and not a Python loop
of 291; the absolute value that the paper puts on the output is left to the parametrisation (metazo/tuner/scale.py), because
other parametrisations, such as RMS * exp(.), need the sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn

SequentialWeights = tuple[Tensor, Tensor, Tensor, Tensor]
"""w1 (hidden, features), b1 (hidden,), w2 (1, hidden), b2 (1,): the tensors of one Linear-Tanh-Linear."""
NUMBERS_PER_UNIT = 7
"""Numbers of each hidden unit of a network of five features: w1, b1, w2."""


class PertNN(nn.Module):
    """Networks for `blocks` parameter blocks, as stacked weights.

    Parameters (float32 until `.to(dtype)`): w1 (blocks, hidden, features), b1 (blocks, hidden), w2 (blocks, hidden),
    b2 (blocks,). They are initialised like torch's own `nn.Linear`, uniform within +-1/sqrt(fan_in), from a separate
    generator; the start of block i does not depend on the number of blocks. `zero_init` zeroes the last layer, so that
    every output is 0 until the network is trained.
    """

    def __init__(
        self, blocks: int, features: int = 5, hidden: int = 64, seed: int = 0, zero_init: bool = False
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [hidden * features, hidden, hidden, 1]
        drawn = torch.rand(blocks, sum(sizes), generator=generator, dtype=torch.float32, device="cpu")
        draws = drawn * 2 - 1  # (blocks, weights of one network)
        w1, b1, w2, b2 = draws.split(sizes, dim=1)
        self.w1 = nn.Parameter((w1 / sqrt(features)).reshape(blocks, hidden, features))
        self.b1 = nn.Parameter(b1 / sqrt(features))
        self.w2 = nn.Parameter(w2 / sqrt(hidden))
        self.b2 = nn.Parameter((b2 / sqrt(hidden)).reshape(blocks))
        if zero_init:
            nn.init.zeros_(self.w2)
            nn.init.zeros_(self.b2)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.w1.shape[0]

    @property
    def hidden(self) -> int:
        """Width of the hidden layer."""
        return self.w1.shape[1]

    @property
    def features(self) -> int:
        """Number of inputs of each network."""
        return self.w1.shape[2]

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw output of every network, (blocks,), for `inputs` (blocks, features) of the weights' dtype and device."""
        hidden = torch.tanh(torch.baddbmm(self.b1.unsqueeze(2), self.w1, inputs.unsqueeze(2)))  # (n, hidden, 1)
        output = torch.baddbmm(self.b2[:, None, None], self.w2.unsqueeze(1), hidden)  # (n, 1, 1)
        return output.flatten()

    @classmethod
    def from_stacked(cls, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> PertNN:
        """A PertNN with these stacked weights, in their dtype; the shapes are those of the class."""
        blocks, hidden, features = w1.shape
        pertnn = cls(blocks, features=features, hidden=hidden).to(w1)
        pertnn.load_state_dict({"w1": w1, "b1": b1, "w2": w2, "b2": b2})
        return pertnn

    @classmethod
    def from_sequentials(cls, networks: Sequence[SequentialWeights]) -> PertNN:
        """Stack networks of one form, given as the four tensors of each `nn.Sequential(Linear, Tanh, Linear)`."""
        w1, b1, w2, b2 = (torch.stack(tensors) for tensors in zip(*networks, strict=True))
        return cls.from_stacked(w1, b1, w2.flatten(1), b2.flatten())
