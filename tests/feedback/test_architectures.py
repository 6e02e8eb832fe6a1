"""Every architecture of the table in docs/feedback.md: the local gradients against float64 autograd."""

from __future__ import annotations

import pytest
import torch

from metazo.bench.architectures import NAMES, build
from metazo.feedback.local import LocalGradient
from metazo.feedback.residual import find_residual
from metazo.feedback.surrogates import Exact


def estimate(tiny, loss, surrogate, recompute=True, narrow=True):
    """The dense gradient by name, and the loss. narrow: a block runs at the last position alone if only that has an error."""
    names = {id(p): name for name, p in tiny.model.named_parameters()}
    local = LocalGradient(find_residual(tiny.model), names, surrogate, recompute)
    local.narrow = local.narrow and narrow
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
    """With the exact error at every block, all trained tensors in the blocks and the tail have autograd's gradient."""
    tiny = build(name)
    loss = getattr(tiny, kind)
    value = loss()
    value.backward()
    true = {key: p.grad for key, p in tiny.model.named_parameters() if p.grad is not None}
    found, captured, local = estimate(tiny, loss, Exact(), recompute=kind == "answer", narrow=False)
    assert captured.loss == pytest.approx(float(value), rel=1e-12)
    inside = [key for key in true if key.startswith(local.residual.path)]
    assert inside and set(inside) <= set(found)
    for key in inside:
        assert relative(found[key], true[key]) < 1e-10 or true[key].norm() < 1e-12, key
    # the tail is exact too, except for tensors that are also used before the blocks (tied embeddings)
    tied = {key for key in found if "emb" in key or "wte" in key}
    for key in set(found) - set(inside) - tied:
        assert relative(found[key], true[key]) < 1e-10 or true[key].norm() < 1e-12, key


@pytest.mark.parametrize("name", NAMES)
def test_a_block_at_its_last_position_alone_has_the_same_gradients(name: str) -> None:
    """The last block, which has an error at one position, against its run on all positions.

    The bound is 1e-6, not 1e-10: the norms of Llama and similar models compute in float32 for all types of weights, and the
    error reaches them in two parts that are rounded separately.
    """
    tiny = build(name)
    whole, _, _ = estimate(tiny, tiny.answer, Exact(), narrow=False)
    narrow, _, _ = estimate(tiny, tiny.answer, Exact())
    assert set(narrow) == set(whole)
    for key, value in whole.items():
        assert relative(narrow[key], value) < 1e-6 or value.norm() < 1e-12, key
