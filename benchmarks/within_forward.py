"""Whether a pass of noise costs less within the forward pass: each layer's weights are moved right before the layer uses them.

Then the layer may read them from the processor's cache, and what was moved is written to memory while it multiplies. One
forward pass of the 134M model at (1, 32), one after a pass over all weights, and one with the pass within it, by turns;
`--group` MB of weights that follow each other are moved in one call.

python benchmarks/within_forward.py --out benchmarks/within_forward.json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does

import torch

from metazo.bench.measurements import environment
from metazo.bench.models import build, lm_loss
from metazo.blocks import NamedTensor, named_tensors
from metazo.noise import Move, PhiloxStream

ROUNDS = 25
GROUPS = (0, 24)  # MB


def moves(tensors: Sequence[NamedTensor]) -> list[Move]:
    return [Move(tensor, tensor.param.data, 1e-9) for tensor in tensors]


def groups_of(model: torch.nn.Module, megabytes: float) -> list[tuple[torch.nn.Module, list[NamedTensor]]]:
    """The tensors of modules that follow each other, up to a size, with the first of these modules."""
    of = {id(tensor.param): tensor for tensor in named_tensors(model)}
    groups: list[tuple[torch.nn.Module, list[NamedTensor]]] = []
    room = 0.0
    for module in model.modules():
        own = [of.pop(id(p)) for p in module.parameters(recurse=False) if id(p) in of]
        size = sum(tensor.param.numel() * 4 for tensor in own) / 2**20
        if own and groups and size <= room:
            groups[-1][1].extend(own)
            room -= size
        elif own:
            groups.append((module, own))
            room = megabytes - size
    return groups


def measure(distribution: str, megabytes: float) -> dict[str, Any]:
    """Milliseconds: median and quartiles of each case."""
    model = build("134M")
    loss, stream, within = lm_loss(model, (1, 32)), PhiloxStream(7, distribution, "auto"), [False]

    def before_use(own: list[NamedTensor]) -> Callable[..., None]:
        return lambda module, inputs: stream.add_all_(moves(own)) if within[0] else None

    groups = groups_of(model, megabytes)
    for module, own in groups:
        module.register_forward_pre_hook(before_use(own))
    every = named_tensors(model)
    times: dict[str, list[float]] = {"forward": [], "pass, then forward": [], "pass within the forward": []}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for case, found in times.items():
                within[0] = case == "pass within the forward"
                began = perf_counter()
                if case == "pass, then forward":
                    stream.add_all_(moves(every))
                loss()
                found.append(1e3 * (perf_counter() - began))
    quartiles = {case: [round(q, 1) for q in quantiles(found[3:], n=4)] for case, found in times.items()}
    return {
        "noise": distribution,
        "MB in a call": megabytes,
        "calls": len(groups),
        "milliseconds (quartiles)": quartiles,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = [measure(distribution, size) for distribution in ("gaussian", "rademacher") for size in GROUPS]
    for row in rows:
        print(row)
    if given.out:
        result = {"environment": environment("cpu", "float32", False), "threads": torch.get_num_threads(), "rows": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
