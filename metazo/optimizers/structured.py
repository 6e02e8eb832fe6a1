"""Base of the methods that use the network's structure: one forward pass, and errors propagated through single blocks.

g of a tensor b is the estimate of metazo/feedback/local.py, and the step is that of metazo/optimizers/recomputed.py. |g_b| is
computed from products of factors, so no gradient of a matrix is formed unless its factors are larger
(metazo/feedback/factors.py). Momentum acts on g before it is normalised.

The blocks are updated from the last to the first, each as soon as its estimate is computed, so that memory is needed for the
weights, the blocks' inputs, and the graph and factors of one block at a time.

Where not to use: with losses that are not differentiable in the last block's output, or depend on lower blocks by another way
(a router's own loss, hidden states of lower blocks, keys and values that blocks share; that part is left out, and the first
step looks for it: metazo/feedback/bypass.py); with models that are a black box, have no single residual stream or run a block
twice; with dropout in the blocks, unless `recompute=False`; in several processes. Methods that perturb weights work in these
cases.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from metazo.blocks import NamedTensor, chunk_of
from metazo.errors import UserError
from metazo.feedback.bypass import bypassed
from metazo.feedback.factors import Gradient
from metazo.feedback.local import LocalGradient
from metazo.feedback.momentum import FactoredMomentum
from metazo.feedback.passes import Captured
from metazo.feedback.residual import find_residual, linear_maps
from metazo.feedback.surrogates import Surrogate
from metazo.kernels.operations import count_operations
from metazo.kernels.outer import plain_
from metazo.optimizers.base import State
from metazo.optimizers.groups import Closure
from metazo.optimizers.guards import NO_GRADIENT
from metazo.optimizers.loss_watch import generators_kept
from metazo.optimizers.recomputed import Recomputed
from metazo.step.buffers import buffers_kept
from metazo.step.directions import Sparse
from metazo.step.lowrank import Held
from metazo.step.terms import Term


class Products(Held):
    """A gradient times a number per tensor. Factors of high rank use torch's matrix product, because the compiled loop is
    made for low ranks. What is multiplied exists for one tensor at a time.
    """

    def __init__(self, gradient: Gradient, numbers: Mapping[str, float]):
        super().__init__(gradient.left, gradient.right, gradient.whole)
        self.numbers = numbers

    def factors(self, stream, tensor) -> tuple[Tensor, Tensor] | None:
        found = super().factors(stream, tensor)
        return None if found is None else (found[0] * self.numbers[tensor.name], found[1])

    def add_(self, stream, tensor, out, alpha, beta=1.0, start=0) -> None:
        number, left = self.numbers[tensor.name], self.left.get(tensor.name)
        if left is None:
            out.mul_(beta).add_(chunk_of(self.whole[tensor.name], start, out) * number, alpha=alpha)
            return
        right = self.right[tensor.name]
        if out.shape != tensor.param.shape:
            first = start // len(right)
            out = out.view(-1, len(right))
            left = left[first : first + len(out)]
        plain_(out, left * number, right, alpha, beta)


class Structured(Recomputed):
    """Base of `SkipFeedback`, `Feedback` and `AnswerColumn`.

    Args:
        params, lr, weight_decay, seed, precision: as for every method. With `normalise`, lr is the length of a step
            relative to the tensor's norm: 0.001 moves every tensor by 0.1 % of its norm per step.
        model: the module whose forward pass the closure runs.
        normalise: a step per tensor as in LARS, or else the estimate unchanged.
        momentum: mu in m <- mu m + g; 0 keeps no state.
        momentum_rank: rank of the momentum of a matrix.
        recompute: run each block again for its local gradient (memory of one block), or keep the graphs of all
            trained blocks (one forward pass less, memory of backpropagation).

    Attributes: untouched, names of trained tensors that the estimate does not reach, after the first step; vanished, the
    number of tensor updates left out because their estimate was not finite.

    Raises UserError if the model has no residual stream, if no trained tensor is in its blocks, or if none gets a gradient.
    """

    needs_model = True
    own_rule = "has its own step, normalised per tensor"
    search_rate = 3e-3

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        *,
        model: nn.Module,
        normalise: bool = True,
        momentum: float = 0.0,
        momentum_rank: int = 16,
        recompute: bool = True,
        weight_decay: float = 0.0,
        seed: int = 0,
        precision: str = "auto",
    ):
        if not 0 <= momentum < 1:
            raise UserError(f"`momentum` must be at least 0 and below 1, not {momentum}.")
        if not isinstance(momentum_rank, int) or momentum_rank < 1:
            raise UserError(f"`momentum_rank` must be a whole number of at least 1, not {momentum_rank}.")
        if momentum_rank != 16 and not momentum:
            warnings.warn(f"`momentum_rank` {momentum_rank} changes nothing without `momentum`.", stacklevel=2)
        self.model, self.normalise, self.recompute = model, normalise, recompute
        self.momentum, self.momentum_rank = momentum, momentum_rank
        # whether the loss depends on lower blocks by another way; known after the first step
        self.bypassed: bool | None = None
        super().__init__(params, lr, weight_decay=weight_decay, seed=seed, precision=precision)

    _just_reached = False  # whether the step that goes on was the first that a gradient reached

    @abstractmethod
    def surrogate(self) -> Surrogate:
        """The error that each block's output gets."""

    def _find_blocks(self) -> None:
        names = {id(tensor.param): tensor.name for tensor in self.tensors}
        self.local = LocalGradient(find_residual(self.model), names, self.surrogate(), self.recompute)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._ready:
            self._find_blocks()  # a copied model has other parameters and needs hooks of its own

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        names = {id(tensor.param): tensor.name for tensor in tensors}
        self.by_name = {tensor.name: tensor for tensor in tensors}
        self.place = {tensor.name: place for place, tensor in enumerate(tensors)}
        self._find_blocks()
        state = super().init(tensors) | {"feedback/reached": torch.zeros(len(tensors), dtype=torch.bool)}
        if not self.momentum:
            return state
        matrices = {names[id(m.weight)] for m in linear_maps(self.model) if id(m.weight) in names}
        self.factored = FactoredMomentum(self.momentum, self.momentum_rank, matrices)
        return state | self.factored.init(tensors)

    @property
    def untouched(self) -> list[str]:
        if not self._reached:
            return []
        return [tensor.name for tensor, there in zip(self.tensors, self.zo_state["feedback/reached"]) if not there]

    @property
    def notes(self) -> list[str]:
        found = super().notes
        if getattr(getattr(self.model, "config", None), "output_router_logits", False):
            found.append(f"{self.name} leaves out the router's own loss, which is not in the last block's output.")
        elif self.bypassed:
            found.append(
                "The loss depends on lower blocks by another way than the last block's input (such as hidden states of several "
                f"layers, or keys and values that blocks share); {self.name} leaves out that part of the gradient."
            )
        if self.untouched:
            found.append(self._without_estimate())
        return found

    def _without_estimate(self) -> str:
        left = self.untouched
        share = sum(self.by_name[name].param.numel() for name in left) / sum(p.numel() for p in self.trained())
        return (
            f"{self.name} has no estimate for {len(left)} trained tensors ({100 * share:.2g} % of the trained weights), which "
            f"do not change, such as {', '.join(left[:3])}: they are before the first block, or no loss reaches them."
        )

    def _warn_of_untouched(self) -> None:
        """After the first step; not of embeddings, which is known (docs/feedback.md), and not of little beside them."""
        tables = {id(each.weight) for each in self.model.modules() if isinstance(each, nn.Embedding)}
        left = [param for name in self.untouched if id(param := self.by_name[name].param) not in tables]
        if sum(param.numel() for param in left) > 0.01 * sum(param.numel() for param in self.trained()):
            warnings.warn(self._without_estimate(), stacklevel=6)  # the caller of `step`

    def measure_cost(self, closure: Closure) -> None:
        """If only the last position contributes to the loss, blocks run there alone, and the cost is measured on the batch."""
        if not self.recompute:  # blocks run whole
            return
        self._prepare()
        with self.weights.evaluating(), self._buffers_kept():
            forward = count_operations(lambda: self._forward(closure))
            step = count_operations(lambda: deque(self.local.gradients(self.local.capture([closure])), maxlen=0))
        self.measured_cost = round(step / forward, 2) if self.local.at_last and forward else 4

    def _buffers_kept(self) -> AbstractContextManager[Any]:
        """Of all modules that run, also those of a loss around the model. A compiled model's own alone, because torch compiles
        it again for the hook that finds the others."""
        parts = list(self.model.modules())
        compiled = any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in parts)
        return buffers_kept(parts if compiled else None)

    @staticmethod
    @torch.no_grad()
    def _forward(closure: Closure) -> None:
        closure()

    def forwards_per_step(self, closures: int = 1) -> float:
        """Cost in forward passes of the trained blocks, if every position contributes to the loss: the pass, running blocks
        again, propagating errors, and gradients. If only the last position does, the operations of a step by those of a
        forward pass, after `measure_cost`.
        """
        return (self.measured_cost or (4 if self.recompute else 3)) * closures

    def look(self, closures: Sequence[Closure]) -> tuple[float, Captured | None]:
        first = self.bypassed is None
        with generators_kept(self.tensors[0].param.device) if first else nullcontext():
            captured = self.local.capture(closures)
        if first:  # draws the same random numbers, after which the generators are where they were
            with self._buffers_kept():
                self.bypassed = bypassed(self.local.recorder, closures, captured) and math.isfinite(captured.loss)
        deltas = [one.delta for one in captured.passes]
        finite = all(bool(delta.isfinite().all()) for delta in deltas)  # type: ignore[union-attr]
        return captured.loss, captured if finite else None

    @property
    def _reached(self) -> bool:
        """Whether a gradient has reached a tensor."""
        found = self.zo_state.get("feedback/reached")
        return found is not None and bool(found.any())

    def descend(self, found: Captured, rates: Sequence[float]) -> None:
        first, gradients = not self._reached, self.local.gradients(found)
        while self._next(gradients, rates):
            pass
        if not self._reached:
            raise UserError(NO_GRADIENT.format(self.name))
        self._just_reached = first

    def counted(self) -> None:
        if self._just_reached:
            self._just_reached = False
            self._warn_of_untouched()

    def _next(self, gradients: Iterator[tuple[int | None, Gradient]], rates: Sequence[float]) -> bool:
        """Take the next block's gradient, computed in the type of the forward pass, and drop it. False if there is none."""
        with self.weights.substituting():
            gradient = next(gradients, (None, None))[1]
        if gradient is not None:
            self._descend(gradient, rates)
        return gradient is not None

    @torch.no_grad()
    def _descend(self, gradient: Gradient, rates: Sequence[float]) -> None:
        self.zo_state["feedback/reached"][[self.place[name] for name in gradient.names]] = True
        if self.momentum:
            gradient = self.factored.update(self.zo_state, gradient)
        factors = {
            name: self.factor(self.by_name[name], gradient.square_norm(name), self.normalise) for name in gradient.names
        }
        moved = {name for name, factor in factors.items() if factor}
        direction = Sparse(Products(gradient, factors), moved)
        decay = self.decay_factors([self.by_name[name] for name in moved], rates)
        seed = self.noise.seed(self.steps, 0)  # seed of the rounding of compensated weights
        self.weights.apply([Term(direction, seed, 1.0)], lambda tensor: rates[tensor.group], decay)
