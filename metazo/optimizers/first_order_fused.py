"""First-order with the update fused into the backward pass (LOMO): no full set of gradients ever exists.

    theta_b <- theta_b - lr g_b        for each tensor b, as soon as backpropagation has its gradient g_b

g_b is then dropped: beside weights and activations, one tensor's gradient exists at a time, and there is no optimizer state.
Source: Lv et al. 2023, "Full parameter fine-tuning for large language models with limited resources" (arXiv 2306.09782),
algorithm 1. Weight decay, and the normalised step instead of the plain one, are those of metazo/optimizers/recomputed.py.

Differences from LOMO: weights of 16 bits keep their precision by metazo.step.precision, not by loss scaling; gradients are
not clipped by their joint norm, which would take a second backward pass: normalise=True is what is offered instead.

Where not to use: losses that are not differentiable, models that are a black box, several processes, or if the activations
of one batch do not fit (then checkpoint the layers, which costs one more forward pass, or use `answer-column`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, chunks
from metazo.errors import UserError
from metazo.optimizers.groups import Closure
from metazo.optimizers.guards import NO_GRADIENT, as_loss
from metazo.optimizers.recomputed import Recomputed
from metazo.optimizers.registry import register
from metazo.step.lowrank import Held
from metazo.step.terms import Term

TOO_EARLY = (
    "{} moves a weight as soon as its gradient is there, and the backward pass still needed the earlier value of {}, which is "
    "used by .detach() too, or in several runs under checkpoints with `use_reentrant=True`: set that to False, or choose "
    "first-order-sgd. Part of the weights have moved in this step."
)


@register
class FirstOrderFused(Recomputed):
    """SGD whose update happens inside the backward pass.

    Args:
        params, lr, weight_decay, seed, precision: as for every method. With `normalise`, lr is the length of a step
            relative to the tensor's norm.
        normalise: LARS's step per tensor, or the gradient as it is (plain SGD).

    Several closures are averaged as one loss, whose graphs exist at the same time: the activations of all of them are kept.
    Attribute vanished: the number of tensor updates left out because their gradient was not finite.
    Raises UserError for a closure whose loss has no graph, if no trained tensor gets a gradient, in several processes, and if
    the backward pass needs a weight after its update, when part of the weights have moved.
    """

    name, paper = "first-order-fused", "arXiv 2306.09782"
    own_rule = "is a first-order method with a step of its own"
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

    def forwards_per_step(self, closures: int = 1) -> float:
        """A backward pass costs about two forward passes."""
        return 3 * closures

    def look(self, closures: Sequence[Closure]) -> tuple[float, Tensor]:
        with torch.enable_grad():
            total = torch.stack([self._loss(evaluate()) for evaluate in closures]).mean()
        return float(total.detach()), total

    def descend(self, found: Tensor, rates: Sequence[float]) -> None:
        with torch.enable_grad(), self._updating(rates) as reached:
            try:
                found.backward()
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                raise UserError(TOO_EARLY.format(self.name, "one of these weights")) from error
        if not reached:
            raise UserError(NO_GRADIENT.format(self.name))

    def _loss(self, value: Any) -> Tensor:
        as_loss(value)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise UserError(
                f"{self.name} needs the loss as a tensor with a graph, and the closure returned {type(value).__name__}: "
                "return it without .item() and without torch.no_grad() or torch.inference_mode() inside."
            )
        return value.reshape(())

    @contextmanager
    def _updating(self, rates: Sequence[float]) -> Iterator[set[str]]:
        """While this is open, a gradient that is complete updates its tensor and is dropped. Yields their names."""
        of, reached = {id(tensor.param): tensor for tensor in self.tensors}, set[str]()

        @torch.no_grad()
        def update(param: Tensor) -> None:
            gradient, param.grad = param.grad, None
            if (
                gradient is None
            ):  # a layer without a backward pass passes on none, and torch calls the hook all the same
                return
            if (name := of[id(param)].name) in reached:
                raise UserError(TOO_EARLY.format(self.name, name))
            reached.add(name)
            self._descend(of[id(param)], gradient.to_dense(), rates)  # an embedding's may be sparse
            self.weights.changed([of[id(param)]])  # torch refuses to go on with a value that was saved before

        for tensor in self.tensors:
            tensor.param.grad = None  # of a backward pass that was not ours
        handles = [tensor.param.register_post_accumulate_grad_hook(update) for tensor in self.tensors]
        try:
            yield reached
        finally:
            for handle in handles:
                handle.remove()

    def _descend(self, tensor: NamedTensor, gradient: Tensor, rates: Sequence[float]) -> None:
        square = _square(gradient)
        if factor := self.factor(tensor, square, self.normalise):
            term = Term(Held({}, {}, {tensor.name: gradient}), self.noise.seed(self.steps, 0), factor)
            self.weights.apply([term], lambda _: rates[tensor.group], self.decay_factors([tensor], rates))


def _square(gradient: Tensor) -> float:
    """|g|^2 in float64, a chunk at a time, because torch copies a tensor that it sums in another dtype."""
    if gradient.is_meta:  # a dry run
        return 1.0
    flat = gradient.reshape(-1)
    norms = [torch.linalg.vector_norm(flat[start:stop], dtype=torch.float64) for start, stop in chunks(gradient)]
    return float(torch.stack(norms).square().sum()) if norms else 0.0
