"""Steps against autograd where the graph holds more than one call of each block and of each linear map."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from metazo.errors import UserError
from metazo.optimizers.answer_column import AnswerColumn
from tests.optimizers.test_structured import Block, Stack, exact, stack, weights


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

    def run(found: torch.Tensor) -> torch.Tensor:
        for block in model.blocks:
            found = block(found)
        return found

    exact(model, lambda: (run(hidden) - torch.no_grad()(run)(hidden + 1)).square().mean() + run(hidden).abs().mean())


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


class Dropping(Block):
    """Dropout that changes nothing yet, because what it enters is 0, as in LoRA at its first step."""

    def __init__(self, inplace: bool):
        super().__init__(inplace)
        self.low, self.zero = torch.nn.Dropout(0.5), torch.nn.Linear(6, 6)
        torch.nn.init.zeros_(self.zero.weight), torch.nn.init.zeros_(self.zero.bias)

    def forward(self, hidden_states):
        return super().forward(hidden_states) + self.zero(self.low(hidden_states))


def dropping(index: int) -> tuple[torch.nn.Module, torch.Tensor]:
    model, hidden = stack()
    model.blocks[index] = Dropping(False).double()
    for other in {0, 1, 2} - {index}:
        model.blocks[other].__class__ = Dropping
        model.blocks[other].low, model.blocks[other].zero = torch.nn.Identity(), torch.nn.Linear(6, 6).double()
    return model, hidden


@pytest.mark.parametrize("index", [0, 1, 2])
def test_dropout_of_any_block_is_refused_whenever_it_begins(index: int) -> None:
    model, hidden = dropping(index)
    optimizer = AnswerColumn(model.named_parameters(), 0.1, model=model)
    message = rf"blocks.{index}.low \(Dropout\) .* when it runs again: switch dropout off \(model.eval\(\)\)"
    with pytest.raises(UserError, match=message):
        optimizer.step(lambda: model(hidden).square().mean())
    optimizer.step(lambda: model.eval()(hidden).square().mean())
    model.train()
    with pytest.raises(UserError, match=message):
        optimizer.step(lambda: model(hidden).square().mean())
    model.blocks[index].low.p = 0.0
    optimizer.step(lambda: model(hidden).square().mean())


def test_dropout_without_a_module_is_noticed_when_train_mode_begins() -> None:
    class Functional(Block):
        def forward(self, hidden_states):
            return hidden_states + torch.nn.functional.dropout(super().forward(hidden_states), 0.5, self.training)

    model, hidden = stack()
    for block in model.eval().blocks:
        block.__class__ = Functional
    optimizer = AnswerColumn(model.named_parameters(), 0.1, model=model)
    optimizer.step(lambda: model(hidden).square().mean())
    model.train()
    with pytest.raises(UserError, match="gives a different output when it runs again: switch dropout off"):
        optimizer.step(lambda: model(hidden).square().mean())


def test_kept_graphs_allow_dropout() -> None:
    model, hidden = dropping(1)
    torch.nn.init.ones_(model.blocks[1].zero.weight)

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        return model(hidden).square().mean()

    exact(model, loss, recompute=False)


def refused(model, hidden, message: str, loss=None) -> None:
    before = weights(model)
    for recompute in (True, False):
        optimizer = AnswerColumn(model.named_parameters(), 0.1, model=model, recompute=recompute)
        with pytest.raises(UserError, match=message):
            optimizer.step(loss or (lambda: model(hidden).square().mean()))
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


class Halved(Stack):
    def forward(self, hidden):
        for block in self.blocks:
            hidden = block(hidden)
            if block is not self.blocks[2]:
                with torch.no_grad():
                    hidden.mul_(0.5)
        return hidden


class Some(Stack):
    """Runs two blocks of the three."""

    ran = (0, 2)

    def forward(self, hidden):
        for index in self.ran:
            hidden = self.blocks[index](hidden)
        return hidden


def test_what_happens_between_blocks_is_refused() -> None:
    model, hidden = stack()
    model.__class__ = Halved
    refused(model, hidden, "The input of block 1 of blocks is not the output of block 0 alone")
    model.__class__ = Some
    refused(model, hidden, "Block 1 of blocks did not run in a forward pass")
    for model.ran, missing in (((0, 1), 2), ((1, 2), 0)):
        refused(model, hidden, f"Block {missing} of blocks did not run in a forward pass")


def test_a_weight_of_a_block_in_the_tail_is_refused() -> None:
    """By a penalty, by the block's own module, and by a tied one."""
    model, hidden = stack()
    up, down = model.blocks[0].up, model.blocks[1].down
    message = r"blocks.{} belongs to a block of blocks, and the part after the last block uses it, too"
    penalty = lambda: model(hidden).square().mean() + down.weight.square().sum()  # noqa: E731
    refused(model, hidden, message.format("1.down.weight"), penalty)
    refused(model, hidden, message.format("0.up.weight"), lambda: up(model(hidden)).square().mean())
    model.head = torch.nn.Linear(6, 8, bias=False).double()
    model.head.weight = up.weight
    refused(model, hidden, message.format("0.up.weight"), lambda: model.head(model(hidden)).square().mean())
    up.weight.requires_grad_(False)
    AnswerColumn(model.named_parameters(), 0.1, model=model).step(lambda: model.head(model(hidden)).square().mean())


class Pair(NamedTuple):
    hidden: torch.Tensor
    extra: None


class AsPair(Block):
    def forward(self, given):
        return Pair(super().forward(given), None)


class AsDict(Block):
    def forward(self, given):
        return {"hidden": super().forward(given)}


class Unpacking(Stack):
    def forward(self, hidden):
        for block in self.blocks:
            found = block(given=hidden)
            hidden = found["hidden"] if isinstance(found, dict) else found.hidden
        return hidden


def test_other_forms_of_the_output_and_input_of_a_block() -> None:
    model, hidden = stack()
    model.__class__ = Unpacking
    for cls in (AsPair, AsDict):
        for block in model.blocks:
            block.__class__ = cls
        if cls is AsPair:
            exact(model, lambda: model(hidden).square().mean())
            exact(model, lambda: model(hidden).square().mean(), recompute=False)
    refused(model, hidden, "Block 0 of blocks returns a dict; feedback needs a tensor, or a tuple that begins with it")


def test_a_loss_of_several_numbers_is_refused() -> None:
    model, hidden = stack()
    before = weights(model)
    optimizer = AnswerColumn(model.named_parameters(), 0.1, model=model)
    with pytest.raises(UserError, match=r"returned a tensor of shape \(2, 3\); return one number"):
        optimizer.step(lambda: model(hidden).mean(-1))
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
