"""Steps against autograd where the graph holds more than one call of each block and of each linear map."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from metazo.errors import UserError
from metazo.optimizers.answer_column import AnswerColumn
from tests.optimizers.test_structured import Block, exact, stack, weights


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_a_call_under_no_grad_gets_no_gradient(off, first: bool, recompute: bool) -> None:
    """Targets from the model itself, as in consistency training, computed before the other call or after it."""
    model, hidden = stack()

    def target() -> torch.Tensor:
        with off():
            return model(hidden + 1)

    def loss() -> torch.Tensor:
        given = target() if first else None
        found = model(hidden)
        return (found - (given if first else target()).clone()).square().mean()

    exact(model, loss, recompute=recompute)


def test_blocks_that_the_closure_calls_itself() -> None:
    model, hidden = stack()

    def run() -> torch.Tensor:
        found = hidden
        for block in model.blocks:
            found = block(found)
        return found

    exact(model, lambda: (run() - torch.no_grad()(run)()).abs().mean() + run().square().mean())


class Twice(Block):
    """Uses a weight by its module and directly."""

    def forward(self, hidden_states):
        inner = self.act(self.up(hidden_states))
        return hidden_states + self.down(inner) + linear(inner, self.up.weight.t())


class Penalised(Block):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + self.up.weight.square().sum()


class Named(Block):
    def forward(self, hidden_states):
        return hidden_states + self.down(input=self.act(self.up(input=hidden_states)))


@pytest.mark.parametrize("cls", [Twice, Penalised, Named])
@pytest.mark.parametrize("recompute", [True, False])
def test_a_weight_that_is_used_outside_its_module_has_its_whole_gradient(cls, recompute: bool) -> None:
    model, hidden = stack()
    for block in model.blocks:
        block.__class__ = cls
    exact(model, lambda: model(hidden).square().mean(), recompute=recompute)


def test_a_weight_that_autocast_casts_once_for_two_uses() -> None:
    model, hidden = stack()
    model, hidden = model.float(), hidden.float()
    for block in model.blocks:
        block.__class__ = Twice

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(hidden).float().square().mean()

    exact(model, loss, atol=1e-2)


def test_a_hook_on_a_weight_changes_its_gradient() -> None:
    model, hidden = stack()
    model.blocks[1].up.weight.register_hook(lambda gradient: gradient * 2)
    exact(model, lambda: model(hidden).square().mean())


def test_a_penalty_on_a_head_and_a_loss_of_shape_1() -> None:
    model, hidden = stack()
    head = model.head = torch.nn.Linear(6, 6).double()
    exact(model, lambda: (head(model(hidden)).square().mean() + head.weight.square().sum()).reshape(1))


def test_a_checkpointed_head() -> None:
    """Its maps run again in the backward pass and are not counted twice."""
    model, hidden = stack()
    model.norm, model.head = torch.nn.LayerNorm(6).double(), torch.nn.Linear(6, 6).double()

    def tail(given: torch.Tensor) -> torch.Tensor:
        return model.norm(model.head(given)).abs().mean()

    def loss() -> torch.Tensor:
        found = model(hidden)
        return sum(checkpoint(tail, part, use_reentrant=False) for part in (found[:1], found[1:]))

    exact(model, loss)


def test_a_loss_of_several_numbers_is_refused() -> None:
    model, hidden = stack()
    before = weights(model)
    optimizer = AnswerColumn(model.named_parameters(), 0.1, model=model)
    with pytest.raises(UserError, match=r"returned a tensor of shape \(2, 3\); return the loss as one number"):
        optimizer.step(lambda: model(hidden).mean(-1))
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
