"""First-order with the update fused into the backward pass (LOMO): no full set of gradients ever exists.

    theta_b <- (1 - lr wd) theta_b - lr g_b                                                normalise=False
    theta_b <- (1 - lr wd) theta_b - lr max(|theta_b|, floor sqrt(n_b)) g_b / |g_b|        normalise=True, n_b entries

for each tensor b as soon as backpropagation has its gradient g_b, which is then dropped: beside weights and activations
one tensor's gradient exists at a time, and there is no optimizer state. Source: Lv et al. 2023, "Full parameter fine-tuning
for large language models with limited resources" (arXiv 2306.09782), algorithm 1; the normalised step is LARS per tensor
(arXiv 1708.03888), as in metazo/optimizers/structured.py.

Differences from LOMO: weights of 16 bits keep their precision by metazo.step.precision, not by loss scaling; gradients are
not clipped by their joint norm, which would take a second backward pass: normalise=True is what is offered instead.

A step cannot be replayed from its record, which holds the loss alone: it is recomputed from its batch.

Where not to use: losses that are not differentiable, models that are a black box, several processes, or if the activations
of one batch do not fit (then checkpoint the layers, which costs one more forward pass, or use `answer-column`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.optimizers.base import State, ZOOptimizer
from metazo.optimizers.groups import Closure, listed
from metazo.optimizers.registry import register
from metazo.optimizers.structured import FLOOR, NO_CLOSURE, REPLAY
from metazo.step.lowrank import Held
from metazo.step.record import Step
from metazo.step.terms import Term


@register
class FirstOrderFused(ZOOptimizer):
    """SGD whose update happens inside the backward pass.

    Args:
        params, lr, weight_decay, seed, precision: as for every method. With `normalise`, lr is the length of a step
            relative to the tensor's norm.
        normalise: LARS's step per tensor, or the gradient as it is (plain SGD).

    Several closures are averaged as one loss, whose graphs exist at the same time: the activations of all of them are kept.
    Attribute vanished: the number of tensor updates left out because their gradient was not finite.
    Raises UserError for a closure whose loss has no graph, and in several processes.
    """

    name, paper = "first-order-fused", "arXiv 2306.09782"
    replayable = False
    own_rule = "is a first-order method with a step of its own"
    common = frozenset({"seed", "precision"})
    search_rate = 1e-2

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-2,
        *,
        normalise: bool = False,
        weight_decay: float = 0.0,
        seed: int = 0,
        precision: str = "auto",
    ):
        self.normalise = normalise
        super().__init__(params, lr, weight_decay=weight_decay, seed=seed, precision=precision)

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        return {"fused/vanished": torch.zeros((), dtype=torch.int64)}

    @property
    def vanished(self) -> int:
        return int(self.zo_state["fused/vanished"]) if self.steps else 0

    @property
    def notes(self) -> list[str]:
        left_out = f"{self.vanished} updates of single tensors were left out: their gradient was not finite."
        return [left_out] if self.vanished else []

    def forwards_per_step(self, closures: int = 1) -> float:
        """A backward pass costs about two forward passes."""
        return 3 * closures

    def step(  # type: ignore[override]
        self, closure: Closure | Sequence[Closure] | None = None, *, replay: Step | None = None
    ) -> float:
        """Take one step; see ZOOptimizer.step. A recorded step is recomputed from its closure, under its learning rates.

        Raises UserError for a replay without a closure, or if the loss is not the recorded one.
        """
        self._prepare()
        closures = listed(closure)
        if not closures:
            raise UserError(REPLAY.format(self.name) if replay else NO_CLOSURE)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UserError(f"{self.name} runs in one process: it has no gradient that could be averaged over several.")
        rates = replay.lr if replay else self.learning_rates(self.steps)
        with torch.enable_grad(), self.weights.evaluating():
            losses = [self._loss(evaluate()) for evaluate in closures]
            total = torch.stack(losses).mean()
        self.forwards += int(self.forwards_per_step(len(closures)))
        loss = float(total.detach())
        if replay and replay.losses != (loss,):
            raise UserError(f"Step {self.steps} was recorded with loss {replay.losses[0]} and gives {loss} now.")
        finite = abs(loss) <= self.max_loss  # false for nan
        self.last_step = Step(self.steps, (), (loss,), (1.0,) if finite else (), rates)
        self._record(self.last_step, replay)
        if finite:
            with self._updating(rates):
                total.backward()
        self.steps += 1
        return loss if finite else math.nan

    def _loss(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise UserError(
                f"{self.name} needs the loss as a tensor with a graph, and the closure returned {type(value).__name__}: "
                "return it without .item() and without torch.no_grad() or torch.inference_mode() inside."
            )
        return value.reshape(())

    @contextmanager
    def _updating(self, rates: Sequence[float]) -> Iterator[None]:
        """While this is open, a gradient that is complete updates its tensor and is dropped."""
        of = {id(tensor.param): tensor for tensor in self.tensors}

        @torch.no_grad()
        def update(param: Tensor) -> None:
            gradient, param.grad = param.grad, None
            assert gradient is not None
            self._descend(of[id(param)], gradient, rates)

        handles = [tensor.param.register_post_accumulate_grad_hook(update) for tensor in self.tensors]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _descend(self, tensor: NamedTensor, gradient: Tensor, rates: Sequence[float]) -> None:
        square = float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
        if not math.isfinite(square):
            self.zo_state["fused/vanished"] += 1
            return
        if self.normalise and not square:
            return
        rate = rates[tensor.group]
        decay = {tensor.name: 1 - rate * float(self.param_groups[tensor.group]["weight_decay"])}
        direction = Held({}, {}, {tensor.name: gradient})
        seed = self.noise.seed(self.steps, 0)  # of the rounding of compensated weights
        amount = self._size(tensor) / math.sqrt(square) if self.normalise else 1.0
        self.weights.apply([Term(direction, seed, amount)], lambda _: rate, decay if self.decays(tensor) else {})

    def _size(self, tensor: NamedTensor) -> float:
        size = sum(float(torch.linalg.vector_norm(theta)) ** 2 for _, theta in self.weights.read(tensor))
        return math.sqrt(max(size, FLOOR**2 * tensor.param.numel()))
