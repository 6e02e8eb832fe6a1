"""HiZOO (Zhao et al., "Second-order fine-tuning without pain for LLMs", arXiv 2402.15173): noise scaled by curvature.

H, one positive number per weight, 1 at first, is a moving estimate of the Hessian's diagonal:

    d  = H^-1/2 z,  z ~ N(0, I)
    c  = (L(theta + eps d) - L(theta - eps d)) / (2 eps)
    k  = |L(theta + eps d) + L(theta - eps d) - 2 L(theta)| / (2 eps^2)
    H <- (1 - a) H + a k H z^2
    theta <- theta - lr (c H^-1/2 z + weight_decay theta)             along the new H, with the same z

Analysis of H (Gaussian z, any positive semidefinite Hessian A; tests/optimizers/test_hizoo.py): given H, the mean of
k z_i^2 is (tr M + 2 M_ii) / 2 with M = H^-1/2 A H^-1/2. The mean of H is therefore constant exactly at
H_i = (d + 2) / 2 A_ii, with d the number of weights: H converges to the diagonal, up to a factor. But all H_i change
together at the rate a, and relative to each other only at 2 a / (d + 2), with noise of variance a (d + 2) / 2 in ln H_i. On a
model of millions of weights HiZOO normalises the step by the curvature and learns almost nothing of its diagonal.

Differences from the published code (Yanjun-Zhao/HiZOO); `compat="official"` (official/hizoo.py) brings back the numbered ones:
 1. H in the weights' dtype. In float16 and bfloat16, at the published a = 1e-8, H stays exactly 1: plain MeZO. Here H
    is float32 at least.
 2. Weight decay on every tensor. Here biases and layer norms are exempt, as in MeZO.
a (`hessian_smooth_type`) is 0 by default in its run.py and script, which is plain MeZO as well; here it is 1e-6, the first
value of its one schedule that runs (1e-6, then 1e-8). The fourth forward, whose loss is only logged, is left out. An
unbiased estimate of the Hessian has H (z^2 - 1) instead of H z^2 and no modulus (the paper's derivation). The published
algorithm, and this file, drop the -1 and take the modulus, which keeps H above 0.

Where not to use: if one copy of the weights in float32 is too much (see HiZOO-L), or with Rademacher noise, for which
z^2 = 1 and H stays a multiple of the identity. H grows with the curvature, and the learning rate has to grow with it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, chunk_of
from metazo.errors import UserError
from metazo.noise import DENSE, Stream
from metazo.optimizers.base import State, Update, ZOOptimizer
from metazo.optimizers.registry import Case, register
from metazo.optimizers.returned import check_reached
from metazo.step.directions import Diagonal, Direction, Isotropic, drawn
from metazo.step.estimators import ThreeLosses


class CurvatureScaled(ZOOptimizer):
    """Base of HiZOO and HiZOO-L. Subclasses make H, whole as the state H/<tensor> or in a form for which they have an
    `inverse_root` of their own; `absorb` updates H after a step.

    Args:
        smoothing: a in [0, 1), weight of a step in H; 1e-8 in the published README, 1e-6 to 1e-2 to see an effect; 0 is
            MeZO.
    """

    def __init__(self, params: Iterable, lr: float = 1e-6, eps: float = 1e-3, *, smoothing: float = 1e-6, **common):
        if not 0 <= smoothing < 1:
            raise UserError(f"`smoothing` must be in [0, 1), not {smoothing}.")
        self.smoothing = smoothing
        self.estimator = ThreeLosses()
        super().__init__(params, lr, eps, **common)

    def inverse_root(self, tensor: NamedTensor, start: int = 0, count: int | None = None) -> Tensor:
        """H^-1/2 in the tensor's shape, or count entries of it from start."""
        whole = self.zo_state[f"H/{tensor.name}"]
        return (whole if count is None else whole.view(-1)[start : start + count]).rsqrt()

    @abstractmethod
    def absorb(self, tensor: NamedTensor, stream: Stream, second: float) -> None:
        """H <- (1 - a) H + a k H z^2 with k = |second| / (2 eps^2), z the noise of the stream."""

    def propose(self, state: State, step: int, seeds: Sequence[int]) -> Direction:
        return Diagonal(Isotropic(), self.inverse_root)

    def update(self, state: State, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        second = ThreeLosses().second_difference(losses)
        if abs(second) > 2 * self.eps**2 * 1e30:  # H is float32
            raise OverflowError
        coefficients = self.estimator.coefficients(losses, self.eps)
        check_reached(coefficients)
        self.weights.leave()  # the probe must be removed with the old H
        stream = self.noise.stream(seeds[0])
        stream.prepare((tensor, None, DENSE) for tensor in self.tensors)
        for tensor in self.tensors:
            self.absorb(tensor, stream, second)
        return Update(coefficients)


@register
class HiZOO(CurvatureScaled):
    """Descent along noise scaled by a diagonal curvature estimate.

    Forwards per step: 3. Extra memory: one copy of the weights, float32. State: H/<tensor>, as the tensor.

    Args:
        compat: "paper", or "official" for the published code with its faults.
    """

    name, paper = "hizoo", "arXiv 2402.15173"
    shardable = True
    contract_case = Case(stiff=3e-3, llama=4e-3, along="sign", options={"smoothing": 1e-3})

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        compat: Literal["paper", "official"] = "paper",
        **common,
    ):
        super().__init__(params, lr, eps, **common)

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        return {f"H/{tensor.name}": ones(tensor, tensor.param.shape, self._dtype(tensor)) for tensor in tensors}

    def _dtype(self, tensor: NamedTensor) -> torch.dtype | None:
        """The dtype of H; None: the tensor's, at least float32."""
        return None

    def absorb(self, tensor: NamedTensor, stream: Stream, second: float) -> None:
        a, eps = self.smoothing, self.eps
        for start, z in drawn(stream, tensor):
            curvature = chunk_of(self.zo_state[f"H/{tensor.name}"], start, z)
            z = z.to(curvature.dtype)
            curvature.mul_(z.square_().mul_(a * abs(second) / (2 * eps**2)).add_(1 - a))


def ones(tensor: NamedTensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Ones on the tensor's device; dtype: by default the tensor's, at least float32."""
    wide = torch.promote_types(tensor.param.dtype, torch.float32)
    return torch.ones(shape, dtype=dtype or wide, device=tensor.param.device)
