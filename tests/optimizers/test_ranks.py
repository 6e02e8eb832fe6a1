"""Two processes that should take the same steps: a difference is reported on both; divided probes give the serial run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from metazo.errors import UserError
from metazo.io import processes
from metazo.optimizers import EGGROLL, ES, FZOO, LOREN, LOZO, HiZOO, MeZO, MeZOAdam, MeZOSVRG, ZOMuon, probing
from metazo.optimizers.ranks import Exchange, check_exchange, checksum
from metazo.step.estimators import AtTheta
from metazo.step.scales import RMSScale
from tests import warm

CASES = {
    "same": {},
    "seed": {"seed": 1},
    "eps": {"eps": 2e-3},
    "lr": {"lr": 2e-6},
    "weights": {},
    "later": {},
    "off": {"seed": 1, "check_every": 0},
}
# A method, the settings of both ranks, and the difference.
UNLIKE: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "shaping": (ES, {}, {"shaping": "rank"}, "estimator is Population(members=30, antithetic=False, shaping='rank')"),
    "compat": (FZOO, {}, {"compat": "official"}, "method is OfficialFZOO there and FZOO"),
    "msign": (ZOMuon, {"rank": 2}, {"rank": 2, "msign": "svd"}, "msign is svd there and newton-schulz"),
    "scale": (
        MeZO,
        {"scale": "rms"},
        {"scale": RMSScale(every=1)},
        "scale is RMSScale(by='tensor', normalise=True, every=1,",
    ),
    "queries": (MeZO, {"check_every": 0}, {"check_every": 0, "queries": 2}, "probes per step is 4 there and 2"),
    "check_every": (MeZO, {"check_every": 0}, {"check_every": 5}, "check_every is 5 there and 0"),
}
DIVIDED: dict[str, tuple[Any, dict[str, Any]]] = {
    "mezo": (MeZO, {}),
    "n-spsa": (MeZO, {"queries": 3}),
    "adam": (MeZOAdam, {"queries": 2}),
    "fzoo": (FZOO, {"queries": 4, "lr": 1e-5}),
    "loren": (LOREN, {"queries": 3}),
    "es": (ES, {"population": 5}),
    "hizoo": (HiZOO, {}),
    "svrg": (MeZOSVRG, {}),
    "lozo": (LOZO, {"queries": 2, "probing": "in-turn"}),
    "together": (EGGROLL, {"population": 6}),
    "bfloat16": (ES, {"population": 5}),
    "compensated": (MeZO, {"queries": 2, "precision": "compensated-8"}),
    "scaled": (MeZO, {"queries": 2, "scale": "rms"}),
}


def _divided(name: str, probe_ranks: int) -> dict[str, Any]:
    """Records and weights of four steps."""
    method, options = DIVIDED[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(4, 8)
    if name in ("bfloat16", "compensated"):
        model, x = model.bfloat16(), x.bfloat16()
    optimizer = method(
        model.named_parameters(), **{"lr": 1e-3, "check_every": 2} | options | {"probe_ranks": probe_ranks}
    )
    calls = 0

    def loss() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return model(x).float().square().mean()

    optimizer.full_closure = loss
    records = []
    for _ in range(4):
        optimizer.step(loss)
        records.append(optimizer.last_step.to_dict())
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    return {"records": records, "weights": weights, "forwards": optimizer.forwards, "calls": calls}


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    said = {}
    for name, options in CASES.items():
        torch.manual_seed(0)
        model, x = nn.Linear(3, 2), torch.ones(4, 3)
        if name == "weights" and rank:
            model.bias.data[1] += 1e-6
        options = {"check_every": 2} | (options if rank or name == "off" else {})
        if name == "off" and not rank:
            options["seed"] = 0
        optimizer = MeZO(model.named_parameters(), **options)
        try:
            for step in range(3):
                if name == "later" and rank and step == 1:
                    model.weight.data[0, 0] += 1e-3
                optimizer.step(lambda: model(x).square().mean() * (1 + rank))
            said[name] = ""
        except UserError as error:
            said[name] = f"{optimizer.steps} {error}"
    for name, (method, *options, _) in UNLIKE.items():
        with pytest.raises(UserError) as raised:
            method(nn.Linear(3, 2).named_parameters(), **options[rank]).step(lambda: 1.0)
        said[name] = str(raised.value)
    for name, probe_ranks in (("too many", 2), ("no divisor", 3)):
        with pytest.raises(UserError) as raised:
            optimizer = MeZO(model.named_parameters(), probe_ranks=probe_ranks, check_every=0)
            optimizer.estimator = AtTheta()
            optimizer.step(lambda: 1.0)
        said[name] = str(raised.value)
    for name, uneven in (("rows", True), ("numbers", False)):
        torch.manual_seed(0)
        model, x = nn.Linear(8, 8), torch.randn(300 if uneven and rank else 4, 8)

        def loss() -> torch.Tensor:
            value = model(x).square().mean()
            return value + float(value > 1) if rank and not uneven else value  # no number can be read under vmap

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settled = LOZO.resolve({"probing": "auto"}, model, loss)["probing"]
            optimizer = LOZO(model.named_parameters(), lr=1e-3, probing="auto", check_every=0)
            optimizer.step(loss)
        choice = int(optimizer.zo_state["probing"])
        said[name] = [settled, choice, float(model.weight.detach().double().square().sum())]
    exchange = Exchange()
    exchange.stop = rank == 1
    said["exchange"] = exchange.combined([1.0 + rank, 3.0 * rank]), exchange.stopped
    said["divided"] = {name: _divided(name, 2) for name in DIVIDED}
    torch.save(said, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    warm.ranks(_process, str(folder))
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


def test_ranks_that_differ_are_refused_on_both(ranks):
    first, second = ranks
    assert all(first[name] == second[name] for name in CASES)
    assert first["same"] == first["off"] == ""
    for name, found in {
        "seed": "0 Rank 1 takes other steps than rank 0: seed is 1 there and 0 on rank 0",
        "eps": "0 Rank 1 takes other steps than rank 0: eps is 0.002 there and 0.001 on rank 0",
        "lr": "0 Rank 1 takes other steps than rank 0: parameter groups is [{'lr': 2e-06",
        "weights": "0 Rank 1 takes other steps than rank 0: 1 of 2 trained tensors have other values, the first is bias",
        "later": "2 Rank 1 takes other steps than rank 0: 1 of 2 trained tensors have other values, the first is weight",
    }.items():
        assert first[name].startswith(found), first[name]
    for name, (*_, found) in UNLIKE.items():
        assert first[name] == second[name]
        assert first[name].startswith(f"Rank 1 takes other steps than rank 0: {found}"), first[name]


def test_the_losses_are_averaged_and_a_stop_is_heard_by_all(ranks):
    assert [said["exchange"] for said in ranks] == [([1.5, 1.5], True)] * 2


@pytest.mark.parametrize("name", ["rows", "numbers"])
def test_all_evaluate_in_turn_if_one_cannot_evaluate_together(ranks, name):
    first, second = ranks
    assert first[name] == second[name] and first[name][:2] == ["in-turn", probing.IN_TURN]


def test_probe_ranks_that_do_not_fit_are_refused(ranks):
    for said in ranks:
        assert "probe_ranks` is 3 and there are 2 processes" in said["no divisor"], said["no divisor"]
        assert said["too many"] == "`probe_ranks` is 2 and the number of probes per step is 1: lower it."


@pytest.mark.parametrize("name", DIVIDED)
def test_divided_probes_give_the_serial_run(ranks, name):
    """Bit for bit if the probes are evaluated in turn: also on both processes, and with fewer evaluations on each."""
    serial, (first, second) = _divided(name, 1), (said["divided"][name] for said in ranks)
    assert first["records"] == second["records"]
    assert all(first["weights"][key].equal(value) for key, value in second["weights"].items())
    assert first["forwards"] == second["forwards"] == serial["forwards"]
    repeats = 3 if name == "together" else 1  # the first step looks twice
    assert abs(first["calls"] - second["calls"]) <= 4 and first["calls"] < serial["calls"] + repeats
    for key, value in serial["weights"].items():
        if name == "together":  # another batch of branches rounds in another way
            assert torch.allclose(value, first["weights"][key], atol=1e-5)
        else:
            assert value.equal(first["weights"][key]), key
    if name != "together":
        assert serial["records"] == first["records"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_checksum_notices_bits_and_places_and_no_chunks(dtype):
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = checksum([(0, values)])
    assert whole == checksum([(0, values[:1024]), (1024, values[1024:])])
    swapped, flipped = values.clone(), values.clone()
    swapped[[5, 6]] = values[[6, 5]]
    flipped[2999] = torch.nextafter(flipped[2999].float(), torch.tensor(9.0)) if dtype != torch.bfloat16 else 9.0
    assert whole != checksum([(0, swapped)]) and whole != checksum([(0, flipped)])


def test_names_of_distributed_data_parallel_are_warned_of(monkeypatch):
    """Their noise is another than that of the run of one process."""
    monkeypatch.setattr(processes, "gathered", lambda mine: [mine, mine])
    named = [("module.w", torch.nn.Parameter(torch.ones(3)))]
    optimizer = MeZO(named)
    optimizer.step(lambda: named[0][1].sum())
    with pytest.warns(UserWarning, match="All names of the weights begin with `module.`"):
        check_exchange(optimizer)
