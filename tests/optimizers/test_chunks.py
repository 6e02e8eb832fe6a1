"""Work in chunks: chunks of any length give the step that whole tensors give, in every precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metazo import blocks
from metazo.blocks import ALIGN, CHUNK, chunk_of, chunks
from metazo.noise import TILE as NOISE_TILE
from metazo.optimizers.mezo import MeZO
from metazo.step.rules import Adam, Momentum
from tests.optimizers.contract import NAMES, case, make, take


class Layers(nn.Module):
    """A matrix and a vector of several chunks, a tensor of three dimensions, a bias; the loss depends on all numbers."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, shape in {"w": (96, 64), "long": (5000,), "cube": (16, 16, 16), "bias": (3,)}.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, nn.Parameter(value.to(dtype)))
        self.layers = nn.ModuleList([nn.ParameterList([nn.Parameter(torch.ones(4, 4, dtype=dtype))])])

    def forward(self) -> torch.Tensor:
        return sum((p.double() - 0.1).square().sum() / p.numel() for p in self.parameters())  # type: ignore[return-value]


def test_pieces_are_whole_rows_that_noise_can_begin_at():
    assert ALIGN % NOISE_TILE == 0 and CHUNK % ALIGN == 0
    for shape in ((3000, 1000), (7, 3), (5_000_000,), (), (2, 3, 500_000)):
        param = torch.empty(shape, device="meta")
        found, row = list(chunks(param)), param[0].numel() if param.ndim > 1 else 1
        assert found[0][0] == 0 and found[-1][1] == param.numel()
        assert all(a[1] == b[0] for a, b in zip(found, found[1:]))
        assert all(start % ALIGN == 0 and start % row == 0 for start, _ in found)
        assert max(stop - start for start, stop in found) <= max(CHUNK, ALIGN * row)


def test_part():
    whole = torch.arange(12).view(3, 4)
    assert chunk_of(whole, 0, whole) is whole
    assert chunk_of(whole, 4, torch.zeros(5)).tolist() == [4, 5, 6, 7, 8]


def after(name: str, dtype: torch.dtype, **options) -> tuple[list[torch.Tensor], dict]:
    model = Layers(dtype)
    optimizer = make(name, list(model.named_parameters()), case(name).quadratic * 0.1, weight_decay=0.1, **options)
    for _ in range(4):
        take(optimizer, model)
    return [p.detach().clone() for p in model.parameters()], optimizer.tensors_state()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float64, "auto"), (torch.bfloat16, "master"), (torch.bfloat16, "compensated-16")],
    ids=["in-place", "master", "compensated"],
)
def test_pieces_change_nothing(name, dtype, precision, monkeypatch):
    options = {"layer": "layers.0"} if name == "dominant-layer" else {}
    whole, state = after(name, dtype, precision=precision, **options)
    monkeypatch.setattr(blocks, "CHUNK", ALIGN)
    cut, other = after(name, dtype, precision=precision, **options)
    rtol, atol = (1e-9, 1e-9) if dtype == torch.float64 else (2e-2, 1e-4)
    for a, b in zip(whole, cut):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    assert state.keys() == other.keys()


@pytest.mark.parametrize("rule", [Momentum(), Adam()])
def test_rules_in_pieces(rule, monkeypatch):
    ends = []
    for tile in (CHUNK, ALIGN):
        monkeypatch.setattr(blocks, "CHUNK", tile)
        model = Layers(torch.float64)
        optimizer = MeZO(model.named_parameters(), lr=1e-3, queries=2, rule=rule, scale="rms")
        for _ in range(4):
            optimizer.step(model)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_a_tensor_that_is_not_contiguous():
    """A tensor that is not contiguous moves like a contiguous one."""
    ends = []
    for memory in (torch.contiguous_format, torch.channels_last):
        for rule in (None, Momentum(), Adam()):
            torch.manual_seed(0)
            value = torch.randn(8, 4, 3, 3, dtype=torch.float64).contiguous(memory_format=memory)
            param = nn.Parameter(value)
            optimizer = MeZO([("w", param)], lr=1e-3, rule=rule)
            for _ in range(3):
                optimizer.step(lambda: (param**3).sum())
            ends.append(param.detach().contiguous())
    for a, b in zip(ends[:3], ends[3:]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
