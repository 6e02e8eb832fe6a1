"""What an evaluation beside a step's own changes in modules is put back."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from metazo.optimizers import MeZO
from metazo.optimizers.skip_feedback import SkipFeedback
from metazo.step import buffers
from metazo.step.buffers import buffers_kept


class Table(nn.Module):
    """A table that grows with its input, and the length it was made for, as of rotary positions."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.ones(2), persistent=False)
        self.length = 2

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.length:
            self.length = len(x)
            self.register_buffer("table", torch.full((len(x),), 0.5), persistent=False)
        return x * self.table[: len(x)]


class Fragile(nn.Module):
    """Deletes one buffer, counts in another, and has a large one of whole numbers and one that is quantised."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gone", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("packed", torch.zeros(buffers.LARGE + 1, dtype=torch.int32))
        self.register_buffer("small", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))

    def forward(self, x: Tensor) -> Tensor:
        del self.gone
        self.count += 1
        return x


@pytest.mark.parametrize("named", [False, True])
def test_buffers_and_what_belongs_to_them_are_put_back(named: bool) -> None:
    model = nn.Sequential(Table(), nn.BatchNorm1d(4), Fragile())
    x = torch.ones(5, 4)
    with buffers_kept(model.modules() if named else None) as changed:
        model[0](torch.ones(5)), model[1](x), model[2](x)
    table, norm, fragile = model
    assert table.length == 2 and len(table.table) == 2
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_mean, torch.zeros(4))
    assert torch.equal(fragile.gone, torch.zeros(2)) and fragile.count == 0
    assert {name for _, name in changed} == {
        "table", "running_mean", "running_var", "num_batches_tracked", "gone", "count",
    }  # fmt: skip
    assert torch.equal(table(torch.ones(5)), torch.full((5,), 0.5)), "a table is made anew"


def test_what_is_known_to_stay_is_not_copied() -> None:
    norm = nn.BatchNorm1d(4)
    with buffers_kept(norm.modules(), []):
        norm(torch.ones(5, 4))
    assert norm.num_batches_tracked == 1
    with buffers_kept(norm.modules(), [(norm, "num_batches_tracked")]):
        norm(torch.ones(5, 4))
    assert norm.num_batches_tracked == 1 and (norm.running_mean != 0).all()


def test_statistics_that_stay_the_same_in_one_pass_are_known_to_change() -> None:
    norm = nn.BatchNorm1d(4)
    norm.running_mean.fill_(1), norm.running_var.fill_(0)
    with buffers_kept(norm.modules()) as changed:
        norm(torch.ones(5, 4))  # the mean and variance that the statistics have
    assert {name for _, name in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    with buffers_kept(norm.modules(), changed):
        norm(torch.randn(5, 4))
    assert torch.equal(norm.running_mean, torch.ones(4)) and norm.num_batches_tracked == 0


def test_a_buffer_written_to_with_its_own_numbers_is_known_to_change() -> None:
    module = nn.Module()
    module.register_buffer("largest", torch.ones(2))
    with torch.inference_mode():
        module.register_buffer("made_in_inference_mode", torch.ones(2))
    with buffers_kept([module]) as changed:
        torch.maximum(module.largest, torch.zeros(2), out=module.largest)
    assert {name for _, name in changed} == {"largest", "made_in_inference_mode"}
    with buffers_kept([module], changed):
        torch.maximum(module.largest, torch.full((2,), 3.0), out=module.largest)
    assert torch.equal(module.largest, torch.ones(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.outer = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("mask", torch.ones(8))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.outer(self.inner(self.norm(hidden)).relu()) * self.mask


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.blocks, self.head = nn.Linear(4, 8), nn.ModuleList(Block() for _ in range(3)), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden).square().mean()


def test_statistics_move_once_in_every_step_of_feedback() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(16, 4)
    model.first.requires_grad_(False)
    optimizer = SkipFeedback(model.named_parameters(), lr=1e-3, model=model)
    for steps in (1, 2, 3):
        optimizer.step(lambda: model(x))
        assert [int(block.norm.num_batches_tracked) for block in model.blocks] == [steps] * 3
    changing = [{name for _, name in changed} for changed in optimizer.local.changing.values()]
    assert changing == [{"running_mean", "running_var", "num_batches_tracked"}] * 3, "the mask is copied once alone"


def test_statistics_of_a_loss_around_the_model_move_once_too() -> None:
    torch.manual_seed(0)
    model, norm, x = Model(), nn.BatchNorm1d(4), torch.randn(16, 4)
    model.first.requires_grad_(False)
    optimizer = SkipFeedback(model.named_parameters(), lr=1e-3, model=model)
    optimizer.measure_cost(lambda: model(norm(x)))
    for steps in (1, 2):
        optimizer.step(lambda: model(norm(x)))
        assert norm.num_batches_tracked == steps


def test_a_step_whose_warning_is_an_error_is_counted() -> None:
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(16, 4)
    optimizer = SkipFeedback(model.named_parameters(), lr=1e-3, model=model)
    records: list[int] = []
    optimizer.recorder = lambda step: records.append(step.step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="has no estimate for"):
            optimizer.step(lambda: model(x))
        before = copy.deepcopy(model.state_dict())
        optimizer.step(lambda: model(x))
    assert optimizer.steps == 2 and records == [0, 1]
    assert not torch.equal(before["head.weight"], model.head.weight)


def test_a_closure_that_changes_weights_often_is_noted_once() -> None:
    model = nn.Linear(4, 1).bfloat16()
    optimizer = MeZO(model.named_parameters(), lr=0.0, precision="compensated-16")

    def closure() -> Tensor:
        for _ in range(3):
            model.weight.data.clamp_(-1, 1)
            torch.clamp_(model.weight, -1, 1)
        return model(torch.ones(2, 4, dtype=torch.bfloat16)).float().square().mean()

    with pytest.warns(UserWarning, match="closure changes 1 trained tensors in place, such as weight"):
        optimizer.step(closure)
    for _ in range(3):
        optimizer.step(closure)
    assert set(optimizer.loss_watch.changed) == {"weight"}
