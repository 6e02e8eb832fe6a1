"""Every architecture of the table in docs/feedback.md: the local gradients beside float64 autograd."""

from __future__ import annotations

import pytest
import torch

from metazo.bench.architectures import NAMES, build
from metazo.feedback.local import LocalGradient
from metazo.feedback.residual import find_residual
from metazo.feedback.surrogates import Exact


def estimate(tiny, loss, surrogate, recompute=True):
    """The dense gradient by name, and the loss."""
    names = {id(p): name for name, p in tiny.model.named_parameters()}
    local = LocalGradient(find_residual(tiny.model), names, surrogate, recompute)
    captured = local.capture([loss])
    found = {}
    for _, gradient in local.gradients(captured):
        for name in gradient.names:
            assert name not in found
            found[name] = gradient.dense(name)
    return found, captured, local


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found - true).norm() / true.norm().clamp(min=1e-12))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["answer", "every"])
def test_local_gradients_under_the_exact_error_are_autograds(name: str, kind: str) -> None:
    """Fed the exact error block by block, all that is trained in and above the blocks has autograd's gradient."""
    tiny = build(name)
    loss = getattr(tiny, kind)
    value = loss()
    value.backward()
    true = {key: p.grad for key, p in tiny.model.named_parameters() if p.grad is not None}
    found, captured, local = estimate(tiny, loss, Exact(), recompute=kind == "answer")
    assert captured.loss == pytest.approx(float(value), rel=1e-12)
    inside = [key for key in true if key.startswith(local.residual.path)]
    assert inside and set(inside) <= set(found)
    for key in inside:
        assert relative(found[key], true[key]) < 1e-10 or true[key].norm() < 1e-12, key
    # what follows the last block is exact too, but for tensors that are also used below it (tied embeddings)
    tied = {key for key in found if "emb" in key or "wte" in key}
    for key in set(found) - set(inside) - tied:
        assert relative(found[key], true[key]) < 1e-10 or true[key].norm() < 1e-12, key
