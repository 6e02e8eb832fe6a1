"""Block scales against plain numpy, and the properties of the normalisation."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from metazo.blocks import Block, named_tensors, partition
from metazo.errors import UserError
from metazo.optimizers import MeZO
from metazo.step.scales import (
    RMS_FLOOR,
    STATISTICS_EVERY,
    RMSScale,
    block_statistics,
    entry_counts,
    floored_rms,
    normalisation,
)
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale, features, parametrise


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            self.layers[0].weight.mul_(30).add_(1)
            self.layers[1].bias.zero_()

    def forward(self):
        return self.head(torch.tanh(self.layers[1](torch.tanh(self.layers[0](self.embed.weight))))).square().mean()


def theta(tensor):
    return [(0, tensor.param.data)]


@pytest.mark.parametrize("by", ["tensor", "layer"])
def test_statistics_are_those_of_all_entries_of_a_block(by):
    blocks = partition(named_tensors(Net()), by)
    found = block_statistics(blocks, theta).numpy()
    for row, block in zip(found, blocks):
        entries = np.concatenate([tensor.param.detach().double().numpy().ravel() for tensor in block.tensors])
        expected = [entries.mean(), entries.var(ddof=1), math.sqrt((entries**2).mean())]
        np.testing.assert_allclose(row, expected, rtol=2e-6, atol=1e-8)


def test_a_block_of_one_entry_has_no_variance():
    parameter = nn.Parameter(torch.tensor([3.0]))
    (block,) = partition(named_tensors([("w", parameter)]))
    assert block_statistics([block], theta).tolist() == [[3.0, 0.0, 3.0]]


def test_partition_by_layer():
    names = [block.name for block in partition(named_tensors(Net()), "layer")]
    assert names == ["embed.weight", "layers.0", "layers.1", "head.weight", "head.bias"]
    with pytest.raises(UserError, match="head"):
        partition(named_tensors(Net()), "head")


def test_normalisation_keeps_the_length_of_the_perturbation():
    counts, sigma = (
        torch.tensor([10.0, 1000.0, 3.0], dtype=torch.float64),
        torch.tensor([5.0, 0.1, 2.0], dtype=torch.float64),
    )
    kappa = normalisation(sigma, counts)
    torch.testing.assert_close((counts * (kappa * sigma) ** 2).sum(), counts.sum())


def test_rms_has_a_floor_so_that_zeros_can_move():
    counts = torch.tensor([100.0, 10.0], dtype=torch.float64)
    rms = floored_rms(torch.tensor([2.0, 0.0], dtype=torch.float64), counts)
    assert rms[0] == 2.0 and rms[1] == pytest.approx(RMS_FLOOR * math.sqrt(400 / 110))
    assert floored_rms(torch.zeros(2).double(), counts).tolist() == [1.0, 1.0]


def test_published_count_of_an_embedding():
    counts = entry_counts(partition(named_tensors(Net())), embedding_rows=15 * 4)
    assert counts.tolist() == [60 * 6, 36, 6, 36, 6, 18, 3]


def test_features():
    state = {
        "scale/losses": torch.tensor([0.7, 0.5, 0.8], dtype=torch.float64),
        "scale/sigma": torch.tensor([2.0], dtype=torch.float64),
        "scale/statistics": torch.tensor([[0.5, 4.0, 2.1]], dtype=torch.float64),
    }
    assert features("published", state).tolist() == [[0.5, 4.0, 0.7, 0.5, 2.0]]
    expected = [math.log(2), 0.25, 0.6, 0.6 - 0.8, math.log(2)]
    torch.testing.assert_close(features("log", state)[0], torch.tensor(expected).double())


def test_parametrisations():
    raw, rms = torch.tensor([-2.0, 0.0, 50.0, -50.0], dtype=torch.float64), torch.full((4,), 0.1, dtype=torch.float64)
    assert parametrise("abs", raw, rms, 1.0).tolist() == [2.0, 0.0, 50.0, 50.0]
    sigma = parametrise("rms_exp", raw, rms, math.log(3))
    assert sigma[1] == 0.1 and sigma[2] == pytest.approx(0.3) and sigma[3] == pytest.approx(0.1 / 3)


def step_lengths(scale, by_name=True) -> dict[str, float]:
    """Root mean square of each tensor's movement in the first probe, in units of eps."""
    net = Net()
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    moved: list[dict[str, float]] = []

    def closure():
        moved.append({n: float((p - before[n]).square().mean().sqrt()) / 1e-3 for n, p in net.named_parameters()})
        return net()

    MeZO(net.named_parameters(), lr=0.0, eps=1e-3, scale=scale, noise="rademacher").step(closure)
    return moved[0]


def test_rms_scale_moves_each_tensor_in_proportion_to_its_size():
    lengths = step_lengths(RMSScale())
    net = Net()
    sizes = {name: float(parameter.square().mean().sqrt()) for name, parameter in net.named_parameters()}
    ratios = {name: lengths[name] / sizes[name] for name in sizes if name != "layers.1.bias"}
    assert max(ratios.values()) / min(ratios.values()) == pytest.approx(1, rel=2e-3)
    energy = sum(lengths[name] ** 2 * parameter.numel() for name, parameter in net.named_parameters())
    assert energy == pytest.approx(sum(parameter.numel() for parameter in net.parameters()), rel=2e-3)


def test_a_tuner_of_zero_output_is_the_rms_scale():
    zero = TunerScale(pertnn=PertNN(7, zero_init=True), features="log", parametrisation="rms_exp")
    assert step_lengths(zero) == pytest.approx(step_lengths(RMSScale()), rel=1e-6)


def test_networks_find_their_blocks_by_name_and_others_run_at_rms_scale():
    net = Net()
    tensors = named_tensors(net)
    names = [tensor.name for tensor in tensors]
    whole = TunerScale(pertnn=PertNN(7, seed=3), networks=names)
    whole.bind(tensors)
    state = whole.init()
    whole.scales(state, 0, theta)
    sigma = dict(zip(names, state["scale/sigma"].tolist()))
    # frozen tensors and another order: the same networks for the same names
    part = TunerScale(pertnn=PertNN(7, seed=3), networks=names)
    part.bind([tensors[4], tensors[1]])
    state = part.init()
    part.scales(state, 0, theta)
    assert state["scale/sigma"].tolist() == pytest.approx([sigma[names[4]], sigma[names[1]]])
    # a block without a network gets its rms, scaled like the others
    partial = TunerScale(pertnn=PertNN(7, seed=3), networks=["/unmatched/0", *names[1:]])
    partial.bind(tensors)
    state = partial.init()
    partial.scales(state, 0, theta)
    rms = floored_rms(state["scale/statistics"][:, 2], partial.counts)
    level = np.exp(np.mean([math.log(sigma[name] / float(rms[i])) for i, name in enumerate(names) if i > 0]))
    assert float(state["scale/sigma"][0]) == pytest.approx(float(rms[0]) * level, rel=1e-6)
    assert state["scale/sigma"].tolist()[1:] == pytest.approx([sigma[name] for name in names[1:]])


def test_losses_reach_the_networks_a_step_later():
    scale = RMSScale()
    scale.bind(named_tensors(Net()))
    state = scale.init()
    scale.observe(state, 2.0, 1.0)
    scale.observe(state, 4.0, 3.0)
    assert state["scale/losses"].tolist() == [4.0, 3.0, 1.5]


@pytest.mark.parametrize("offset", [0.0, -5.0, -1.5])
def test_the_change_of_loss_does_not_depend_on_an_offset(offset):
    """Rewards are minimised with a minus sign; a mean of 0 is a loss like any other. The first two steps have no change."""
    scale, changes = RMSScale(), []
    scale.bind(named_tensors(Net()))
    state = scale.init()
    for plus, minus in ((2.0, 1.0), (1.0, 2.0), (0.5, 0.0)):
        changes.append(float(features("log", state)[0, 3]))
        scale.observe(state, plus + offset, minus + offset)
    changes.append(float(features("log", state)[0, 3]))
    assert changes == [0.0, 0.0, 0.0, -1.25]


@pytest.mark.parametrize("partial", [False, True])
def test_a_network_of_a_layer_is_for_all_of_its_tensors(partial):
    tensors = named_tensors(Net())
    blocks = partition(tensors, "layer")
    own = [frozenset(tensor.name for tensor in block.tensors) for block in blocks]
    scale = TunerScale(
        pertnn=PertNN(len(blocks), seed=3), networks=[b.name for b in blocks], tensors=own, by="layer", partial=partial
    )
    scale.bind(tensors)
    assert scale.known.tolist() == list(range(len(blocks)))
    frozen = next(block for block in blocks if len(block.tensors) > 1).tensors[0].name
    rest = [tensor for tensor in tensors if tensor.name != frozen]
    if partial:
        scale.bind(rest)
        assert len(scale.known) == len(scale.blocks) - 1
    else:
        with pytest.raises(UserError, match="is for all tensors of this block together, and others are trained here"):
            scale.bind(rest)


def test_a_tuner_for_nothing_here_is_refused():
    scale = TunerScale(pertnn=PertNN(1), networks=["elsewhere"])
    with pytest.raises(UserError, match=r"no network for any trained block, such as 'embed.weight'"):
        scale.bind(named_tensors(Net()))
    with pytest.raises(UserError, match="3 networks for 7 blocks"):
        TunerScale(pertnn=PertNN(3)).bind(named_tensors(Net()))


def test_block_counts_entries():
    block: Block = partition(named_tensors(Net()), "layer")[1]
    assert block.numel == 42


def test_what_rare_readings_do_to_sigma_was_measured():
    """The committed figures are of the default, and small; the measurement runs."""
    path = Path(__file__).parents[2] / "benchmarks" / "statistics_every.py"
    spec = importlib.util.spec_from_file_location("statistics_every", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = json.loads(benchmark.RESULT.read_text())["rows"]
    assert set(rows) == set(benchmark.ARMS)
    for row in rows.values():
        assert set(map(int, row)) == set(benchmark.EVERY)
        assert row["1"]["largest"] == 0 < row[str(STATISTICS_EVERY)]["mean"] < 0.01
    found = benchmark.differences("rms", steps=3)
    assert found["1"]["largest"] == 0 and 0 < found["50"]["largest"] < 0.01


@pytest.mark.parametrize(("half", "zero", "loss"), [(True, False, 7e4), (False, True, 1.0)])
def test_a_scale_that_is_not_finite_is_refused_before_the_weights_move(half, zero, loss):
    """Networks of float16 overflow, and those that give 0 have no direction."""
    networks = PertNN(1, zero_init=zero)
    p = torch.nn.Parameter(torch.randn(4, 4))
    scale = TunerScale(pertnn=networks.half() if half else networks, every=1)
    optimizer = MeZO([("a.weight", p)], lr=0.0, scale=scale, check_loss=False)
    with pytest.raises(UserError, match="The scale of block a.weight is not finite at step"):
        for _ in range(2):
            optimizer.step(lambda: torch.tensor(loss))
    assert bool(p.isfinite().all())


def test_weights_of_which_many_are_zeros_are_named():
    """LoRA's second factors are zeros at first, and new biases are few."""

    def step(net: nn.Module) -> None:
        MeZO(net.named_parameters(), lr=1e-3, scale="rms", check_loss=False).step(lambda: net(torch.ones(8)).sum())

    adapters = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False))
    nn.init.zeros_(adapters[1].weight)
    with pytest.warns(
        UserWarning,
        match=r"1 of the 2 trained blocks are zeros, the first is 1.weight, and hold 50% .*leave `scale` out",
    ) as found:
        step(adapters)
    assert found[0].filename == __file__
    layer = nn.Sequential(nn.Linear(8, 32, bias=False), nn.Linear(32, 8))
    nn.init.zeros_(layer[1].bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(layer)
