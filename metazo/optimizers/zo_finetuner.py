"""ZO Fine-tuner (arXiv 2510.00419): MeZO with noise whose scale in each block is chosen by a small trained network.

    sigma_b = |PertNN_b(mean theta_b, var theta_b, L+_{t-1}, L-_{t-1}, sigma_b,t-1)|
    kappa   = sqrt(sum D_b) / sqrt(sum D_b sigma_b^2)
    c       = (L(theta + eps kappa sigma z) - L(theta - eps kappa sigma z)) / (2 eps)
    theta_b <- theta_b - lr c kappa sigma_b z_b

Differences from the published code (trainer_zo_fine_tuner.py): kappa counts an embedding by its entries and not as
15 * batch * width (a tuner whose embedding_count is "published" does so, and then depends on the batch size); the factors
20 and 10, which cancel, are removed; weight decay and learning-rate schedules work; the networks run as one batched
product; the statistics of the blocks are read every `every` steps (1: as published). It runs on any device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from metazo.errors import UserError
from metazo.optimizers.base import ZOOptimizer
from metazo.optimizers.registry import Case, register
from metazo.step.scales import BlockScale


@register
class ZOFinetuner(ZOOptimizer):
    """MeZO under a tuner's block scales. Forwards per step: 2. Extra memory: about 450 numbers per block.

    Args: as ZOOptimizer; scale is required: `tuner_scale(tuner, model.named_parameters(), batch_size=16)` for steps of 16
    examples.
    Where not to use: on a model whose blocks are not the tuner's; the RMS scale (MeZO, `scale="rms"`) needs no tuner.
    """

    name, paper = "zo-finetuner", "arXiv 2510.00419"
    needs_tuner = shardable = deferrable = True
    contract_case = Case(scaled=False)

    def __init__(self, params: Iterable, lr: float = 1e-6, eps: float = 1e-3, *, scale: BlockScale, **common):
        if not isinstance(scale, BlockScale):
            raise UserError("zo-finetuner needs a tuner: give one as `tuner`, or use MeZO with `scale='rms'`.")
        super().__init__(params, lr, eps, scale=replace(scale), **common)
