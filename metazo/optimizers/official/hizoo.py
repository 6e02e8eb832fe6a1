"""HiZOO as published (Yanjun-Zhao/HiZOO): H in the weights' dtype, which at a = 1e-8 never changes in float16 and
bfloat16, and weight decay on every tensor."""

from __future__ import annotations

import torch

from metazo.blocks import NamedTensor, chunk_of
from metazo.noise import Stream
from metazo.optimizers.hizoo import HiZOO
from metazo.optimizers.registry import official
from metazo.step.directions import drawn


@official(HiZOO)
class OfficialHiZOO(HiZOO):
    def _dtype(self, tensor: NamedTensor) -> torch.dtype:
        return tensor.param.dtype

    def decays(self, tensor: NamedTensor) -> bool:
        return True

    def absorb(self, tensor: NamedTensor, stream: Stream, second: float) -> None:
        a, eps = self.smoothing, self.eps
        for start, z in drawn(stream, tensor):
            curvature = chunk_of(self.zo_state[f"H/{tensor.name}"], start, z)
            z = z.to(curvature.dtype)
            # in this order, so that it underflows exactly if the published code does
            curvature.copy_((1 - a) * curvature + abs(second) * (curvature * z * z) * a / (2 * eps * eps))
