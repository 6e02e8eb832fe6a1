"""Two processes that should take the same steps: a difference is reported on both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from metazo.errors import UserError
from metazo.optimizers import MeZO
from metazo.optimizers.ranks import checksum

CASES = {
    "same": {},
    "seed": {"seed": 1},
    "eps": {"eps": 2e-3},
    "lr": {"lr": 2e-6},
    "weights": {},
    "later": {},
    "off": {"seed": 1, "check_every": 0},
}


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
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
    torch.save(said, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_that_differ_are_refused_on_both(tmp_path: Path):
    multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert first["same"] == first["off"] == ""
    for name, found in {
        "seed": "0 Rank 1 takes other steps than rank 0: seed is 1 there and 0 on rank 0",
        "eps": "0 Rank 1 takes other steps than rank 0: eps is 0.002 there and 0.001 on rank 0",
        "lr": "0 Rank 1 takes other steps than rank 0: parameter groups is [{'lr': 2e-06",
        "weights": "0 Rank 1 takes other steps than rank 0: 1 of 2 trained tensors have other values, the first is bias",
        "later": "2 Rank 1 takes other steps than rank 0: 1 of 2 trained tensors have other values, the first is weight",
    }.items():
        assert first[name].startswith(found), first[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_checksum_notices_bits_and_places_and_no_chunks(dtype):
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = checksum([(0, values)])
    assert whole == checksum([(0, values[:1024]), (1024, values[1024:])])
    swapped, flipped = values.clone(), values.clone()
    swapped[[5, 6]] = values[[6, 5]]
    flipped[2999] = torch.nextafter(flipped[2999].float(), torch.tensor(9.0)) if dtype != torch.bfloat16 else 9.0
    assert whole != checksum([(0, swapped)]) and whole != checksum([(0, flipped)])
