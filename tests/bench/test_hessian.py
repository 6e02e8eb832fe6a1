"""The norms of a Hessian's blocks, beside closed forms, torch's whole Hessian, and for estimates their error bars."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks import hessian_blocks
from metazo.bench.heatmaps import hessian_picture
from metazo.bench.hessian import BlockNorms, block_norms, products
from metazo.blocks import named_tensors, partition
from metazo.errors import UserError

SIZES = {"a": (3, 2), "b": (4,), "c": (2, 2), "linear": (3,)}


class Quadratic(nn.Module):
    """x^T A x / 2 + sum(linear): the Hessian is A by the entries of a, b and c, and 0 by those of linear."""

    def __init__(self, coupling: float = 0.3):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        for name, shape in SIZES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64)))
        matrix = coupling * torch.randn(14, 14, generator=random, dtype=torch.float64)
        self.matrix = matrix + matrix.T + torch.diag(torch.arange(1.0, 15.0, dtype=torch.float64))

    def forward(self) -> Tensor:
        x = torch.cat([self.a.flatten(), self.b, self.c.flatten()])
        return x @ self.matrix @ x / 2 + self.linear.sum()

    def wanted(self) -> Tensor:
        parts = [torch.cat(row, 1) for row in [[self.matrix, torch.zeros(14, 3)], [torch.zeros(3, 17)]]]
        return squares(torch.cat(parts), [6, 4, 4, 3])


def squares(matrix: Tensor, sizes: list[int]) -> Tensor:
    """Squared norms of the blocks of a matrix."""
    return torch.stack([torch.stack([(part**2).sum() for part in row.split(sizes, 1)]) for row in matrix.split(sizes)])


def blocks(model: nn.Module, by: str = "tensor"):
    return partition(named_tensors(model), by)


def test_exact_norms_are_those_of_the_matrix() -> None:
    model, ticks = Quadratic(), []
    found = block_norms(model, blocks(model), tick=lambda: ticks.append(1))
    assert found.exact and found.names == list(SIZES) and found.entries == [6, 4, 4, 3]
    torch.testing.assert_close(found.norms, model.wanted(), rtol=1e-12, atol=1e-12)
    assert len(ticks) == products(blocks(model)) == 17
    wanted = model.wanted()
    assert found.share == pytest.approx(float(wanted.trace() / wanted.sum()), rel=1e-12) and found.share_error == 0
    assert found.even == pytest.approx((36 + 16 + 16 + 9) / 17**2)
    torch.testing.assert_close(found.own[:3], (wanted.diagonal() / wanted.sum(1))[:3])
    assert math.isnan(found.own[3])


def test_a_block_diagonal_hessian_has_a_share_of_one() -> None:
    model = Quadratic(coupling=0.0)
    assert block_norms(model, blocks(model)).share == 1
    estimated = block_norms(model, blocks(model), limit=0, draws=3)
    assert estimated.share == 1 and estimated.share_error == 0  # signs have no variance on a diagonal matrix
    torch.testing.assert_close(estimated.norms, model.wanted())


def test_estimates_are_unbiased_within_their_errors() -> None:
    """Standardised differences over 30 seeds: mean 0 and standard deviation 1, within three of their own errors."""
    model, seeds = Quadratic(), 30
    wanted, share = model.wanted(), block_norms(model, blocks(model)).share
    entries, shares = [], []
    for seed in range(seeds):
        found = block_norms(model, blocks(model), limit=0, draws=60, seed=seed)
        assert not found.exact and torch.equal(found.norms, found.norms.T)
        entries.append(((found.norms - wanted) / found.errors)[0, 1])
        shares.append((found.share - share) / found.share_error)
    for values in (torch.stack(entries), torch.tensor(shares)):
        assert abs(float(values.mean())) < 3 / seeds**0.5
        assert 1 - 3 / (2 * seeds) ** 0.5 < float(values.std()) < 1 + 3 / (2 * seeds) ** 0.5


class Network(nn.Module):
    """Two numbered layers and a head, with an attention between them, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 3)
        self.to(torch.float64)
        self.x, self.y = torch.randn(5, 6, 4, dtype=torch.float64), torch.randint(0, 3, (5,))

    def forward(self) -> Tensor:
        hidden = torch.tanh(self.layers[0](self.x))
        hidden = nn.functional.scaled_dot_product_attention(hidden, hidden, hidden, is_causal=True)
        return nn.functional.cross_entropy(self.head(torch.tanh(self.layers[1](hidden))[:, -1]), self.y)


@pytest.mark.parametrize("by", ["tensor", "layer"])
def test_exact_norms_of_a_network_are_those_of_torchs_hessian(by: str) -> None:
    model = Network()
    cut = blocks(model, by)
    params = {tensor.name: tensor.param for block in cut for tensor in block.tensors}
    shapes = [param.shape for param in params.values()]

    def at(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(params, parts, shapes)}
        return torch.func.functional_call(model, values, ())

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        whole = torch.autograd.functional.hessian(
            at, torch.cat([param.detach().flatten() for param in params.values()])
        )
    found = block_norms(model, cut)
    torch.testing.assert_close(found.norms, squares(whole, found.entries), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found.norms, found.norms.T, rtol=1e-9, atol=1e-14)
    estimate = block_norms(model, cut, limit=0, draws=300)
    inside = (estimate.norms - found.norms).abs() <= 4 * estimate.errors + 1e-15
    assert bool(inside.all()) and abs(estimate.share - found.share) < 4 * estimate.share_error


def test_what_is_refused() -> None:
    model = Quadratic()
    with pytest.raises(UserError, match="has no Hessian"):
        block_norms(lambda: model().detach(), blocks(model))
    with pytest.raises(UserError, match="at least 2"):
        block_norms(model, blocks(model), draws=1)
    narrow = nn.Linear(2, 2).to(torch.bfloat16)
    with pytest.raises(UserError, match="weight is torch.bfloat16"):
        block_norms(lambda: narrow(torch.ones(1, 2)).sum(), blocks(narrow))

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("derivative for once_backward is not implemented")

    with pytest.raises(UserError, match="not finite"):
        block_norms(lambda: model() + (model.a * math.inf).pow(2).sum(), blocks(model))
    with pytest.raises(UserError, match="cannot be differentiated twice .*once_backward"):
        block_norms(lambda: Once.apply(model.a), blocks(model))


def test_a_hessian_of_zeros_has_no_share() -> None:
    model = nn.Linear(2, 1).double()
    found = block_norms(lambda: model(torch.ones(1, 2, dtype=torch.float64)).sum(), blocks(model))
    assert isinstance(found, BlockNorms) and math.isnan(found.share) and found.norms.abs().max() == 0
    with pytest.raises(UserError, match="is 0, so there is nothing to draw"):
        hessian_picture(found, "")


@pytest.mark.parametrize("layers", [0, 1, 4])
def test_nothing_of_a_picture_is_outside_of_it(layers: int) -> None:
    """Title and labels, of which a part would be another number. The title is wider than the picture of two blocks."""
    kinds = [f"{part}.{name}" for part in ("self_attn", "mlp") for name in ("q_proj", "k_proj", "down_proj", "o_proj")]
    kinds += ["post_attention_layernorm"]
    names = [f"model.layers.{layer}.{kind}.weight" for layer in range(layers) for kind in kinds] or ["a", "b"]
    ones = torch.ones(1, len(names), len(names), dtype=torch.float64)
    title = "62.2 ± 1.8 % of the Hessian's squared norm is within the blocks; 25.0 % if all entries were alike"
    figure = hessian_picture(BlockNorms(names, [1] * len(names), ones, True), title)
    figure.draw_without_rendering()
    left, right = figure.axes[:2]
    labels = [*left.get_yticklabels(), *left.get_xticklabels(), *right.get_xticklabels()]
    heads = [left.title, right.title, *(text for text in figure.texts if "62.2" in text.get_text())]
    assert len(heads) == 3 and {"0 mlp.down_proj", "a"} & {text.get_text() for text in labels}
    width, height = figure.bbox.size
    for text in (*labels, *heads):
        box = text.get_window_extent()
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, text.get_text()


def test_the_document_has_the_table_of_the_file() -> None:
    rows = json.loads(hessian_blocks.RESULT.read_text())
    assert hessian_blocks.table(rows) in (hessian_blocks.ROOT / "docs" / "meta-learning.md").read_text()
    assert {row["model"] for row in rows} == {"pico", *hessian_blocks.SHAPES} and not any(
        row[name]["exact"] for row in rows for name in hessian_blocks.MEASURED
    )
