"""The one-step meta-gradient, streamed: one ordinary backward pass, no second copy of the model.

    theta'_b = theta_b - lr_update c s_b z_b,      s_b = kappa sigma_b,      c = (L+ - L-) / (2 eps)

With z and c held fixed, dL(theta') / d s_b = -lr_update c <grad_b L(theta'), z_b>. As each parameter's gradient
arrives, z_b is drawn again, the dot product is taken and the gradient freed. Memory: the weights, the activations, and
the gradient of one tensor; the published code keeps two models and their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metazo.blocks import Block, NamedTensor
from metazo.noise import Noise, TorchOrderNoise
from metazo.step.directions import Isotropic, Scaled
from metazo.step.terms import Term
from metazo.step.weights import Weights

Loss = Callable[[], Tensor]
"""Evaluates a loss at the current weights, differentiably if grad is enabled."""


def stream_gradients(tensors: Sequence[NamedTensor], loss: Loss, visit: Callable[[NamedTensor, Tensor], None]) -> float:
    """Backward through `loss`; `visit(tensor, gradient)` is called once per gradient when it is complete, then it is freed.

    A tied weight is visited once, with the sum over its uses. Gradients arrive in no fixed order. There is no backward
    pass if the loss is not finite. Returns: the loss.
    """

    def hook_of(tensor: NamedTensor):
        def hook(param: Tensor) -> None:
            gradient, param.grad = param.grad, None
            assert gradient is not None
            visit(tensor, gradient.to_dense())  # an embedding may have a sparse one

        return hook

    handles = [tensor.param.register_post_accumulate_grad_hook(hook_of(tensor)) for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.param.grad = None
        with torch.enable_grad():
            value = loss()
            if math.isfinite(float(value.detach())):
                value.backward()
        return float(value.detach())
    finally:
        for handle in handles:
            handle.remove()
        for tensor in tensors:
            tensor.param.grad = None


def dot(a: Tensor, b: Tensor) -> float:
    """<a, b> of two tensors of one shape, in at least float32."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return float(torch.dot(a.flatten().to(wide), b.flatten().to(wide)))


class Redraw:
    """The noise of one seed, tensor by tensor in any order.

    Noise in the published order is a single stream, so the generator's state before each tensor (5 kB) is kept.
    """

    def __init__(self, noise: Noise, seed: int, tensors: Sequence[NamedTensor]):
        self.stream = noise.stream(seed)
        self.states: dict[str, Tensor] = {}
        if isinstance(noise, TorchOrderNoise):
            for tensor in tensors:
                self.states[tensor.name] = self.stream.generator.get_state()  # type: ignore[attr-defined]
                self.stream.draw(tensor)

    def __call__(self, tensor: NamedTensor) -> Tensor:
        """z of the tensor, in its shape."""
        if self.states:
            self.stream.generator.set_state(self.states[tensor.name])  # type: ignore[attr-defined]
        return self.stream.draw(tensor)

    def dot(self, tensor: NamedTensor, gradient: Tensor) -> float:
        """<gradient, z>; if the order of drawing is free, z is not kept."""
        return dot(gradient, self(tensor)) if self.states else self.stream.dot(tensor, gradient)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class OneStep:
    """The result for one direction."""

    loss: float
    """L(theta'), the meta-loss."""
    plus: float
    minus: float
    gradient: Tensor
    """dL(theta') / d s_b, (blocks,), float64; NaN if a loss was not finite."""


def block_of(blocks: Sequence[Block]) -> dict[str, int]:
    """Index of the block of each tensor, by its name."""
    return {tensor.name: index for index, block in enumerate(blocks) for tensor in block.tensors}


def one_step(
    weights: Weights,
    blocks: Sequence[Block],
    scales: Tensor,
    seed: int,
    loss: Loss,
    outer: Loss | None = None,
    *,
    eps: float,
    lr_update: float,
) -> OneStep:
    """Take one zeroth-order step, measure the loss after it and its gradient in the scales, and undo the step.

    Args:
        scales: s_b = kappa sigma_b, (blocks,).
        loss: on the batch of the step; evaluated twice, without grad.
        outer: the loss after the step, on another batch; None: on the same batch.
        eps, lr_update: probe length and step size of the inner step.

    The weights are restored by the inverse move, which in float32 leaves a relative error of about 1e-8 per step. The
    closures must be deterministic. Not for weights narrower than float32: the rounded step would differ from the
    differentiated one.
    """
    place = block_of(blocks)
    values = scales.tolist()
    direction = Scaled(Isotropic(), {name: values[index] for name, index in place.items()})
    products = [0.0] * len(blocks)
    try:
        with torch.no_grad():
            weights.visit([Term(direction, seed, eps)])
            plus = float(loss())
            weights.visit([Term(direction, seed, -eps)])
            minus = float(loss())
            c = (plus - minus) / (2 * eps)
            if math.isfinite(c):
                weights.visit([Term(direction, seed, -lr_update * c)])
        if not math.isfinite(c):
            return OneStep(math.nan, plus, minus, torch.full((len(blocks),), math.nan, dtype=torch.float64))
        redraw = Redraw(weights.noise, seed, weights.tensors)

        def visit(tensor: NamedTensor, gradient: Tensor) -> None:
            products[place[tensor.name]] += redraw.dot(tensor, gradient)

        meta_loss = stream_gradients(weights.tensors, outer or loss, visit)
    finally:
        with torch.no_grad():
            weights.leave()
    gradient = torch.tensor(products, dtype=torch.float64) * (-lr_update * c)
    return OneStep(meta_loss, plus, minus, gradient if math.isfinite(meta_loss) else gradient * math.nan)
