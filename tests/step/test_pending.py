"""An update that waits for the next probe: fewer passes over the weights, and whoever reads the weights gets them whole."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from metazo.errors import UserError
from metazo.kernels import outer
from metazo.noise import cpu
from metazo.optimizers import LOZO, METHODS, MeZO
from metazo.optimizers.probing import TOGETHER
from metazo.step.directions import Isotropic, Sparse
from metazo.step.precision import Master
from metazo.step.scales import RMSScale

STEPS = 6


def layer() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(70, 50, bias=False)


def loss(net: nn.Linear) -> torch.Tensor:
    return (net.weight * torch.linspace(-1, 1, 70)).sum().sin()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were asked to go over the weights."""
    made: list[str] = []

    def counted(module, name: str, size) -> None:
        kernel = getattr(module, name)

        def call(*args):
            made.extend([name] * bool(size(*args)))
            return kernel(*args)

        monkeypatch.setattr(module, name, call)

    counted(cpu, "add_all_", lambda distribution, moves, seed, purpose: [m for m in moves if m[1].shape == (50, 70)])
    counted(cpu, "add_two_all_", lambda distribution, moves, seeds, purpose: moves)
    counted(outer, "share", lambda kernel, jobs: True)
    return made


@pytest.mark.parametrize(
    ("name", "options"),
    [("mezo", {}), ("mezo", {"noise": "rademacher"}), ("zo-finetuner", {"scale": RMSScale()})],
    ids=["gaussian", "rademacher", "zo-finetuner"],
)
@pytest.mark.parametrize(("defer", "expected"), [(False, 3 * STEPS), (True, 2 * STEPS + 1)])
def test_mezo_goes_over_the_weights_twice_per_step(name, options, defer, expected, passes):
    net = layer()
    optimizer = METHODS[name](net.named_parameters(), lr=1e-2, **options)
    optimizer.defer = defer
    for _ in range(STEPS):
        optimizer.step(lambda: loss(net))
    optimizer.settle()
    assert len(passes) == expected
    assert passes.count("add_two_all_") == (STEPS - 1 if defer else 0)


@pytest.mark.parametrize(("defer", "expected"), [(False, 3 * STEPS), (True, 2 * STEPS + 1)])
def test_lozo_goes_over_the_weights_twice_per_step(defer, expected, passes):
    net = layer()
    optimizer = LOZO(net.named_parameters(), lr=1e-2, interval=2)
    optimizer.defer = defer
    for _ in range(STEPS):
        optimizer.step(lambda: loss(net))
    optimizer.settle()
    assert passes.count("share") == expected


def test_whoever_asks_the_optimizer_for_weights_gets_them_with_the_update():
    nets = layer(), layer()
    waiting, plain = (MeZO(net.named_parameters(), lr=1e-2) for net in nets)
    waiting.defer = True
    for net, optimizer in zip(nets, (waiting, plain)):
        optimizer.step(lambda net=net: loss(net))
    assert waiting.weights.pending is not None
    assert not torch.equal(nets[0].weight, nets[1].weight), "the update waits"
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(UserError, match=r"waits \(`defer`\) .* call optimizer.settle\(\) before"):
            copied((nets[0], waiting))
    (tensor,) = waiting.tensors
    for _, theta in waiting.weights.read(tensor):
        assert torch.equal(theta, nets[1].weight)
    waiting.step(lambda: loss(nets[0]))
    plain.step(lambda: loss(nets[1]))
    waiting.state_dict()
    assert torch.equal(nets[0].weight, nets[1].weight)
    copy.deepcopy(waiting)


def test_a_closure_that_fails_leaves_the_weights_of_the_last_step():
    nets = layer(), layer()
    waiting, plain = (MeZO(net.named_parameters(), lr=1e-2) for net in nets)
    waiting.defer = True
    for net, optimizer in zip(nets, (waiting, plain)):
        optimizer.step(lambda net=net: loss(net))

        def fails():
            raise RuntimeError

        with pytest.raises(RuntimeError):
            optimizer.step(fails)
    assert waiting.weights.pending is None and torch.equal(nets[0].weight, nets[1].weight)


@pytest.mark.parametrize("method", [MeZO, LOZO])
def test_weights_with_a_master_are_rounded_from_it_by_the_next_probe_alone(method, monkeypatch):
    """Rounding is a pass over the weights, and the next probe rounds all of them again."""
    rounded: list[Master] = []
    settle = Master.settle
    monkeypatch.setattr(Master, "settle", lambda master: [rounded.append(master), settle(master)])
    nets = layer().bfloat16(), layer().bfloat16()
    waiting, plain = (method(net.named_parameters(), lr=1e-2) for net in nets)
    waiting.defer = True
    for _ in range(STEPS):
        waiting.step(lambda: loss(nets[0]))
    assert not rounded and waiting.weights.waits
    with pytest.raises(UserError, match=r"waits \(`defer`\) .* call optimizer.settle\(\) before"):
        copy.deepcopy((nets[0], waiting))
    for _ in range(STEPS):
        plain.step(lambda: loss(nets[1]))
    assert len(rounded) == STEPS and not plain.weights.waits
    assert waiting.last_step == plain.last_step and not torch.equal(nets[0].weight, nets[1].weight)
    (tensor,) = waiting.tensors
    assert all(torch.equal(theta.bfloat16(), nets[1].weight) for _, theta in waiting.weights.read(tensor))
    assert torch.equal(nets[0].weight, nets[1].weight) and len(rounded) == STEPS + 1
    copy.deepcopy(waiting)


@pytest.mark.parametrize("when", ["closure", "probe"])
def test_a_step_that_fails_leaves_weights_rounded_from_their_masters(when, monkeypatch):
    nets = layer().bfloat16(), layer().bfloat16()
    waiting, plain = (MeZO(net.named_parameters(), lr=1e-2) for net in nets)
    waiting.defer = True
    for net, optimizer in zip(nets, (waiting, plain)):
        optimizer.step(lambda net=net: loss(net))

    def fails(*given):
        raise RuntimeError

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        if when == "probe":
            patched.setattr(cpu, "place_all_", fails)
        waiting.step(fails if when == "closure" else lambda: loss(nets[0]))
    waiting.settle()
    assert torch.equal(nets[0].weight, nets[1].weight)


class Mixed(nn.Module):
    """Weights in place beside masters, in two blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)) for _ in range(2))
        for layer in self.layers:
            layer[0].bfloat16()


def loss_of_all(net: nn.Module) -> torch.Tensor:
    return sum((p.float() * torch.linspace(-1, 1, p.shape[-1])).sum().sin() for p in net.parameters())


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("interrupted", [1, 2])
def test_ctrl_c_at_the_end_of_a_pass_leaves_no_probe_on_weights_with_masters(defer, steps, interrupted, monkeypatch):
    """A compiled pass runs to its end before Python raises."""
    net = Mixed()
    optimizer = MeZO(net.named_parameters(), lr=1e-2)
    optimizer.defer = defer
    for _ in range(steps):
        optimizer.step(lambda: loss_of_all(net))
    optimizer.settle()
    expected, place, passes = copy.deepcopy(net), cpu.place_all_, []

    def stopped(*given):
        place(*given)
        passes.append(given)
        if len(passes) == interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(cpu, "place_all_", stopped)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: loss_of_all(net))
    for weight, before in zip(net.parameters(), expected.parameters()):  # in float32 moved there and back
        assert torch.allclose(weight, before, rtol=0, atol=0 if weight.dtype == torch.bfloat16 else 1e-6)


class OneTensor(MeZO):
    """Probes a tensor in each step, in turn."""

    def propose(self, state, step, seeds):
        return Sparse(Isotropic(), [self.tensors[step % len(self.tensors)].name])


@pytest.mark.parametrize("narrow", [True, False], ids=["masters alone", "beside weights in place"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (MeZO, {"weight_decay": 0.1}),
        (MeZO, {"queries": 2}),
        (MeZO, {"scale": "rms"}),
        (LOZO, {"interval": 2, "form": "weights"}),
        (OneTensor, {"weight_decay": 0.1}),
    ],
)
def test_masters_that_wait_give_the_losses_and_weights_of_those_that_do_not(method, options, narrow):
    nets = Mixed(), Mixed()
    for net in nets if narrow else ():
        net.bfloat16()
    waiting, plain = (method(net.named_parameters(), lr=1e-2, **options) for net in nets)
    waiting.defer = True
    for step in range(9):
        for net, optimizer in zip(nets, (waiting, plain)):
            optimizer.param_groups[0]["lr"] *= 0.9
            if step == 6:
                optimizer.step(lambda: torch.tensor(float("nan")))
                assert not optimizer.weights.waits
            optimizer.step(lambda net=net: loss_of_all(net))
        assert waiting.last_step == plain.last_step
        if method is not OneTensor:
            assert waiting.weights.behind == {tensor.name for tensor in waiting.weights.masters}
    waiting.settle()
    assert all(map(torch.equal, *(net.parameters() for net in nets)))


def test_decay_and_block_scales_wait_too_and_several_queries_do_not():
    for options, waits in (({"weight_decay": 0.1}, True), ({"queries": 2}, False), ({"scale": "rms"}, True)):
        nets = layer(), layer()
        waiting, plain = (MeZO(net.named_parameters(), lr=1e-2, **options) for net in nets)
        waiting.defer = True
        for _ in range(3):
            for net, optimizer in zip(nets, (waiting, plain)):
                optimizer.step(lambda net=net: loss(net))
            assert (waiting.weights.pending is not None) == waits
        waiting.settle()
        assert torch.equal(nets[0].weight, nets[1].weight)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lozo", {"form": "activations"}),
        ("lozo", {"form": "auto", "scale": "rms"}),
        ("lozo", {"form": "activations", "queries": 2}),
        ("lozo-m", {"form": "activations"}),
        ("fzoo", {"rank": 1, "probing": "together"}),
        ("eggroll", {"population": 4}),
        ("zo-muon", {"probing": "together"}),
    ],
)
def test_probes_that_are_evaluated_together_see_the_update_that_waited(name, options):
    """They do not move the weights, and so do not apply it."""
    nets = layer(), layer()
    waiting, plain = (METHODS[name](net.named_parameters(), lr=1e-2, **options) for net in nets)
    waiting.defer = True
    for _ in range(4):
        for net, optimizer in zip(nets, (waiting, plain)):
            optimizer.step(lambda net=net: loss(net))
        assert waiting.last_step == plain.last_step
    assert waiting.zo_state["probing"] == TOGETHER
    waiting.settle()
    assert torch.equal(nets[0].weight, nets[1].weight)
