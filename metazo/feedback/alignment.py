"""The cosine of an estimate with the true gradient, by block and by tensor within the block.

cosine = <g, h> / (|g| |h|),   <l r^T, m s^T> = sum_ij (l_i . m_j) (r_i . s_j)        from factors, without forming a matrix
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from metazo.feedback.factors import Gradient
from metazo.feedback.local import LocalGradient
from metazo.feedback.passes import Closure
from metazo.feedback.residual import find_residual
from metazo.feedback.surrogates import Exact, Surrogate

EVERY = "all"


@dataclass(frozen=True)
class Alignment:
    """block: index, or None for all; site: the tensor's name within the block, or "all"; ratio: |estimate| / |true|."""

    block: int | None
    site: str
    cosine: float
    ratio: float


def alignments(model: nn.Module, closures: Sequence[Closure], surrogate: Surrogate) -> list[Alignment]:
    """Compare the estimate of a surrogate with the exact gradient of the closures' mean loss, in the trained blocks.

    Returns: one row per tensor, per block, and for all blocks together. Cost: two forward passes and two local backward
    passes; memory of one block and its factors.
    """
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    residual = find_residual(model)
    estimates = LocalGradient(residual, names, surrogate), LocalGradient(residual, names, Exact())
    streams = [local.gradients(local.capture(closures)) for local in estimates]
    sums: dict[tuple[int | None, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for (index, estimate), (_, true) in zip(*streams):
        if index is None:
            continue
        for name in true.names:
            site = name.removeprefix(f"{residual.path}.{index}.")
            products = inner(estimate, true, name), estimate.square_norm(name), true.square_norm(name)
            for key in ((index, site), (index, EVERY), (None, site), (None, EVERY)):
                sums[key] = [a + b for a, b in zip(sums[key], products)]
    return [Alignment(block, site, *_angles(*values)) for (block, site), values in sums.items()]


def inner(one: Gradient, two: Gradient, name: str) -> float:
    """<g, h> for one tensor; 0 if g or h has no estimate for it."""
    if name in one.left and name in two.left:
        left, right = one.left[name].t() @ two.left[name], one.right[name].t() @ two.right[name]
        return float((left * right).double().sum())
    if name not in one.names or name not in two.names:
        return 0.0
    return float((one.dense(name).double() * two.dense(name).double()).sum())


def _angles(dot: float, estimate: float, true: float) -> tuple[float, float]:
    if not estimate or not true:
        return 0.0, 0.0
    return dot / (estimate * true) ** 0.5, (estimate / true) ** 0.5
