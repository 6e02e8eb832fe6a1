"""What it gains that a probe on the activations adds its short product to a layer's output in place (metazo/step/batched.py).

A step of the 134M model with it and without it, and the forward passes that the step stands for, by turns in one process: LOZO
on the activations with one query and with four (2 and 8 forward passes), FZOO with rank 1 in one pass (9).

python benchmarks/added_in_place.py --out benchmarks/added_in_place.json      # about three minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does

import torch

from metazo.bench.measurements import environment
from metazo.bench.models import build, lm_loss
from metazo.optimizers import METHODS
from metazo.step import batched

LOZO = ("lozo", {"form": "activations"}, 2)
CASES = (  # batch x length, (method, options, forward passes), rounds
    ((1, 32), LOZO, 21),
    ((8, 64), LOZO, 7),
    ((16, 128), LOZO, 3),
    ((8, 64), ("lozo", {"form": "activations", "queries": 4}, 8), 3),
    ((8, 64), ("fzoo", {"rank": 1, "probing": "together"}, 9), 3),
)


def measure(shape: tuple[int, int], method: tuple[str, dict[str, Any], int], rounds: int) -> dict[str, Any]:
    """Ratios of a step to its forward passes, round by round: quartiles."""
    name, options, passes = method
    model = build("134M")
    loss, in_place = lm_loss(model, shape), batched._add_in_place
    optimizer = METHODS[name](model.named_parameters(), lr=1e-7, check_loss=False, **options)
    optimizer.defer = True

    def forwards() -> None:
        with torch.inference_mode():
            loss()
            loss()

    def step(way: Any) -> None:
        batched._add_in_place = way
        optimizer.step(loss)

    cases = {"forwards": forwards, "in place": lambda: step(in_place), "apart": lambda: step(lambda *tensors: False)}
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        for case, call in cases.items():
            begun = perf_counter()
            call()
            if number:  # the first round compiles and allocates
                seconds[case].append(perf_counter() - begun)
    batched._add_in_place = in_place
    ratios = {
        case: [2 * own / (passes * two) for own, two in zip(seconds[case], seconds["forwards"])]
        for case in ("in place", "apart")
    }
    quartiles = {case: [round(value, 3) for value in quantiles(found, n=4)] for case, found in ratios.items()}
    return {"shape": list(shape), "method": name, "options": options, "rounds": rounds, "ratio (quartiles)": quartiles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = []
    for case in CASES:
        rows.append(measure(*case))
        print(rows[-1], flush=True)
    found = {"environment": environment("cpu", "float32", False), "threads": torch.get_num_threads(), "rows": rows}
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
