"""The reference for tests: K zeroth-order steps unrolled on `higher`, differentiated by autograd.

`higher` 0.2.1 patches modules by slicing `ModuleList`, which transformers 5 no longer allows. The model is therefore
wrapped first: a small module owns the parameters under flat names and calls the model through
`torch.func.functional_call`; `higher` unrolls that module. Each of K steps keeps four copies of the weights until the gradient
is taken (its new weights, its noise, and the weights of L+ and L-), so this is for small models and for tests of gradient.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metazo.blocks import Block, named_tensors
from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.meta.gradient import OneStep, Redraw, block_of
from metazo.meta.objective import Outcome, Situation, averaged
from metazo.noise import Noise
from metazo.step.scales import State

with needs("meta"):
    import higher

ModelLoss = Callable[[nn.Module], Tensor]
"""The loss of a model on a batch."""


class _LossOf(nn.Module):
    """A model as a module whose forward computes a given loss of the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, loss: ModelLoss) -> Tensor:
        return loss(self.model)


class Flat(nn.Module):
    """Owns a model's trainable parameters under flat names, tied ones once; forward(loss) is the model's loss with them.

    The parameters are copies, so the model itself is never touched.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = [_LossOf(model)]  # kept in a list, because as a submodule it would be patched
        self.names = [tensor.name for tensor in named_tensors(model)]
        for index, tensor in enumerate(named_tensors(model)):
            self.register_parameter(f"p{index}", nn.Parameter(tensor.param.detach().clone()))

    def forward(self, loss: ModelLoss) -> Tensor:
        values = {f"model.{name}": getattr(self, f"p{index}") for index, name in enumerate(self.names)}
        return functional_call(self.inner[0], values, (loss,))


def unrolled_steps(
    model: nn.Module,
    blocks: Sequence[Block],
    scales: Tensor,
    noise: Noise,
    seeds: Sequence[int],
    losses: Sequence[ModelLoss],
    outer: ModelLoss,
    *,
    eps: float,
    lr_update: float,
) -> OneStep:
    """K = len(seeds) zeroth-order steps with fixed z and c from the model's weights, and the gradient of the loss after them.

    Args: scales: s_b, (blocks,), the same in every step. losses: on each inner step's batch. outer: after the last step.
    Returns: the outer loss, the mean L+ and L-, and d outer / d s_b, (blocks,), float64.
    """
    tensors = [tensor for block in blocks for tensor in block.tensors]
    place = block_of(blocks)
    flat = Flat(model)
    by_name = {tensor.name: tensor for tensor in tensors}
    if set(flat.names) != set(by_name):
        raise UserError("The unrolled mode works on all trainable tensors of a model under the names it gives them.")
    s = scales.detach().clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patched: Any = higher.monkeypatch(flat, copy_initial_weights=False, track_higher_grads=True)
    plus, minus = [], []
    for seed, loss in zip(seeds, losses, strict=True):
        present = list(patched.parameters())
        redraw = Redraw(noise, seed, tensors)
        z = [redraw(by_name[name]) for name in flat.names]
        rows = [place[name] for name in flat.names]
        with torch.no_grad():
            moves = [s[row].to(p.dtype) * noise_of * eps for row, noise_of, p in zip(rows, z, present)]
            plus.append(float(patched(loss, params=[p + m for p, m in zip(present, moves)])))
            minus.append(float(patched(loss, params=[p - m for p, m in zip(present, moves)])))
        c = (plus[-1] - minus[-1]) / (2 * eps)
        patched.update_params([p - lr_update * c * s[row].to(p.dtype) * d for p, row, d in zip(present, rows, z)])
    value = patched(outer)
    result = float(value.detach())
    if math.isfinite(result):
        (gradient,) = torch.autograd.grad(value, s)
    else:
        gradient = torch.full_like(s, math.nan)
    return OneStep(result, sum(plus) / len(plus), sum(minus) / len(minus), gradient.double())


@dataclass(frozen=True)
class UnrolledLoss:
    """The loss after K zeroth-order steps on one batch, through `unrolled_steps`; arguments as OneStepLoss.

    Where not to use: on large models, because the memory grows with 4 K copies of the weights.
    """

    model: nn.Module
    loss_of: Callable[[Situation], tuple[ModelLoss, ModelLoss]]
    """This step's loss and the loss on another batch, as functions of a model."""
    unroll: int = 2
    eps: float = 1e-3
    lr_update: float = 1e-6
    queries: int = 1
    detach_kappa: bool = True
    separate: bool = False

    def init(self, blocks: Sequence[Block]) -> State:
        return {}

    def __call__(self, situation: Situation) -> Outcome:
        s = situation
        scales = s.scales(self.detach_kappa)
        loss, other = self.loss_of(s)
        steps = []
        for query in range(self.queries):
            seeds = [s.seed(query * self.unroll + k) for k in range(self.unroll)]
            outer = other if self.separate else loss
            settings = {"eps": self.eps, "lr_update": self.lr_update}
            inner = [loss] * self.unroll
            steps.append(unrolled_steps(self.model, s.blocks, scales, s.weights.noise, seeds, inner, outer, **settings))
        return averaged(steps, scales)
