"""The methods of the contract suite, and its small problems; `contract_case` says how a method is constructed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from metazo.blocks import trained
from metazo.optimizers import OPTIMIZERS, ZOOptimizer
from metazo.optimizers.registry import Case
from metazo.step.record import Step
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale

CHOSEN = os.environ.get("METAZO_CONTRACT_METHODS")  # a few by name, for tests/mutate.py
NAMES = sorted(CHOSEN.split(",") if CHOSEN else OPTIMIZERS)


def case(name: str) -> Case:
    return OPTIMIZERS[name].contract_case


def tuner_scale(count: int) -> TunerScale:
    return TunerScale(pertnn=PertNN(count, seed=1), every=1, features="log", parametrisation="rms_exp")


def make(name: str, named: Sequence, lr: float, **options) -> ZOOptimizer:
    """The method over (name, parameter) pairs, or over parameter groups of them."""
    if OPTIMIZERS[name].needs_tuner:
        pairs = [pair for entry in named for pair in (entry["params"] if isinstance(entry, dict) else [entry])]
        options.setdefault("scale", tuner_scale(len(trained(pairs))))
    if name == "mezo-svrg":
        options.setdefault("mini_lr", lr)
    if OPTIMIZERS[name].needs_model:
        pytest.skip("the contract's problems are no language models: give the method a test of its own")
    return OPTIMIZERS[name](named, lr=lr, **case(name).options | options)  # type: ignore[return-value]


def take(optimizer: ZOOptimizer, closure: Callable | Sequence[Callable] | None, replay: Step | None = None) -> float:
    """One step; a method with a loss over all examples gets the same closure for it."""
    if optimizer.wants_full_closure:
        optimizer.full_closure = closure  # type: ignore[attr-defined]
    return optimizer.step(closure, replay=replay)


class Toy(nn.Module):
    """Quadratic in a matrix and a bias, both in one layer: L = sum_i curvature_i (theta_i - target_i)^2 / 2."""

    def __init__(self, curvatures: Tensor, dtype: torch.dtype = torch.float64, frozen: bool = False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        layer = nn.Module()
        layer.w = nn.Parameter(torch.zeros(4, 3, dtype=dtype))
        layer.b = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.layers = nn.ModuleList([layer])
        self.curvatures = curvatures
        self.target = torch.randn(15, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            layer.w.copy_(torch.randn(4, 3, generator=generator))
            layer.b.copy_(torch.randn(3, generator=generator))

    def flat(self) -> Tensor:
        return torch.cat([p.flatten() for p in self.parameters()]).double()

    def forward(self) -> Tensor:
        return (self.curvatures * (self.flat() - self.target).square()).sum() / 2

    def copies(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters()]

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.named_parameters())


def quadratic(dtype: torch.dtype = torch.float64) -> Toy:
    return Toy(torch.ones(15, dtype=torch.float64), dtype)


def stiff() -> Toy:
    return Toy(torch.logspace(0, 2, 15, dtype=torch.float64)[torch.randperm(15, generator=torch.manual_seed(2))])


def llama(tied: bool = False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=24, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, max_position_embeddings=16, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


IDS = (torch.arange(48).view(6, 8) * 7) % 24


class MonkeySaddle(nn.Module):
    """x^3 - 3 x y^2 at its saddle, at which gradient and Hessian vanish."""

    def __init__(self):
        super().__init__()
        layer = nn.Module()
        layer.w = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
        self.layers = nn.ModuleList([layer])

    def forward(self) -> Tensor:
        x, y = self.layers[0].w.flatten()  # type: ignore[union-attr,operator]
        return x**3 - 3 * x * y**2
