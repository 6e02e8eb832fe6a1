"""Accumulated: every micro-batch of an accumulation is part of its step."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from metazo.integrations import Accumulated
from metazo.optimizers import MeZO


def test_no_micro_batch_is_dropped() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    net, plain = nn.Linear(4, 1), nn.Linear(4, 1)
    plain.load_state_dict(net.state_dict())
    batches = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0)).unbind()
    loader = accelerator.prepare(torch.utils.data.DataLoader(batches, batch_size=None))
    optimizer = Accumulated(accelerator, MeZO(net.named_parameters(), lr=1e-3, check_loss=False))
    losses = []
    for batch in loader:
        with accelerator.accumulate(net):
            losses.append(optimizer.step(lambda batch=batch: net(batch).square().mean()))
            optimizer.zero_grad()
    other = MeZO(plain.named_parameters(), lr=1e-3, check_loss=False)
    parts = [batches[0:3], batches[3:6], batches[6:7]]  # the last of an epoch ends its accumulation
    expected = [other.step([lambda b=b: plain(b).square().mean() for b in part]) for part in parts]
    assert [loss for loss in losses if loss is not None] == expected
    assert [loss is None for loss in losses] == [True, True, False, True, True, False, False]
    assert torch.equal(net.weight, plain.weight)
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    fresh = Accumulated(accelerator, MeZO(nn.Linear(4, 1).named_parameters(), lr=1e-3))
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.optimizer.steps == 3


def test_what_a_loop_that_was_left_has_kept_is_part_of_the_next_step_until_a_state_is_loaded() -> None:
    """accelerate counts on, and would add their gradients."""
    for loaded in (False, True):
        accelerator, net, called = Accelerator(cpu=True, gradient_accumulation_steps=3), nn.Linear(4, 1), set()
        optimizer = Accumulated(accelerator, MeZO(net.named_parameters(), lr=1e-3, check_loss=False))
        batches = torch.randn(6, 5, 4).unbind()

        def closure(number: int, net=net, batches=batches, called=called) -> torch.Tensor:
            called.add(number)
            return net(batches[number]).square().mean()

        for number in range(2):  # and out
            with accelerator.accumulate(net):
                assert optimizer.step(lambda number=number: closure(number)) is None
        if loaded:
            optimizer.load_state_dict(optimizer.state_dict())
        with accelerator.accumulate(net):
            assert optimizer.step(lambda: closure(2)) is not None
        assert called == ({2} if loaded else {0, 1, 2})
