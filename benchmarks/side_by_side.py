"""What it would gain to evaluate both probes of a step at the same time, each in a thread with perturbed copies of the weights.

A step of MeZO as it is taken (the probes in turn, in two threads), a step whose two probes are evaluated side by side, and two
forward passes in turn, by turns in one process, on the 134M model. It is no part of metazo: it doubles the activations, and a
closure with state of its own would run in two threads at once, where a race is a wrong loss without a word.

python benchmarks/side_by_side.py --out benchmarks/side_by_side.json      # about a minute on 2 cores
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import quantiles
from threading import get_ident
from time import perf_counter
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does

import torch
from torch import Tensor

from metazo.bench.measurements import environment
from metazo.bench.models import build, lm_loss
from metazo.blocks import NamedTensor
from metazo.noise import Place
from metazo.optimizers import MeZO
from metazo.step.substitute import Room, Scratch, Shown
from metazo.step.terms import Term

RATE, EPS = 1e-7, 1e-3
CASES = [
    (shape, dtype, precision)
    for shape in ((1, 32), (8, 64))
    for dtype, precision in (
        ("float32", "in-place"),
        ("bfloat16", "master"),
        ("bfloat16", "compensated-16"),
        ("bfloat16", "compensated-8"),
    )
]


class Lanes(Shown):
    """Torch functions get the copies of the probe that their thread evaluates."""

    def __init__(self, tensors: Any):
        super().__init__(tensors)
        self.copies: dict[int, Scratch] = {}

    def make(self, tensor: NamedTensor) -> Tensor:
        raise AssertionError("the copies of a lane are made by its Scratch")

    def use(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.copies[get_ident()].use(func, args, kwargs)


class SideBySide:
    """Steps of an optimizer's MeZO whose probes are evaluated at the same time, the second in a thread of its own."""

    def __init__(self, optimizer: MeZO, loss: Any):
        self.optimizer, self.loss, self.steps = optimizer, loss, 0
        self.rooms, self.orders = [Room(), Room()], [list[int](), list[int]()]
        self.pool = ThreadPoolExecutor(1)

    def _copies(self, lane: int, seed: int, amount: float) -> Scratch:
        weights, stream = self.optimizer.weights, self.optimizer.noise.stream(seed)

        def make(group: Any, rows: Tensor | None) -> list[Tensor]:
            outs = []
            for tensor in group:
                theta, place = tensor.param.data, weights.storage[tensor.name]
                out = self.rooms[lane].fresh(theta) if rows is None else torch.empty_like(theta)
                if place.theta is None:
                    assert stream.place_split_(tensor, out, theta, place.buffers["compensation"], amount, rows)
                else:
                    stream.place_all_([Place(tensor, out, place.theta, amount)])
                outs.append(out)
            return outs

        return Scratch(self.optimizer.tensors, make, self.orders[lane])

    def _evaluate(self, lane: int, lanes: Lanes, seed: int, amount: float) -> float:
        torch.set_num_threads(1)
        lanes.copies[get_ident()] = copies = self._copies(lane, seed, amount)
        with torch.inference_mode():
            found = float(self.loss())
        copies.order[:] = copies._uses
        return found

    def __call__(self) -> None:
        seed, threads, weights = self.steps, torch.get_num_threads(), self.optimizer.weights
        self.steps += 1
        with Lanes(self.optimizer.tensors) as lanes:
            other = self.pool.submit(self._evaluate, 1, lanes, seed, -EPS)
            plus, minus = self._evaluate(0, lanes, seed, EPS), other.result()
        torch.set_num_threads(threads)
        direction = self.optimizer.propose(self.optimizer.zo_state, 0, [seed])
        with torch.no_grad():
            weights.apply([Term(direction, seed, (plus - minus) / (2 * EPS))], lambda tensor: RATE, {})
            weights.changed()


def measure(shape: tuple[int, int], dtype: str, precision: str, rounds: int) -> dict[str, Any]:
    """Ratios to two forward passes in turn, round by round: quartiles."""
    model = build("134M", dtype)
    loss = lm_loss(model, shape)
    optimizer = MeZO(model.named_parameters(), lr=RATE, eps=EPS, precision=precision, check_loss=False)
    optimizer.defer = True
    lone = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))
    optimizer.step(loss)
    optimizer.settle()
    side = SideBySide(optimizer, loss)

    def forward() -> None:
        with torch.inference_mode():
            loss()

    def in_turn() -> None:
        optimizer.step(loss)

    def passes_side_by_side() -> None:
        for done in [lone.submit(forward) for _ in range(2)]:
            done.result()

    cases = {
        "two forwards": lambda: (forward(), forward()),
        "two forwards, side by side": passes_side_by_side,
        "step": in_turn,
        "step, side by side": side,
    }
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    threads = torch.get_num_threads()
    for number in range(rounds + 1):
        for case, call in cases.items():
            torch.set_num_threads(threads)
            begun = perf_counter()
            call()
            if number:
                seconds[case].append(perf_counter() - begun)
            optimizer.settle()
    first = seconds.pop("two forwards")
    ratios = {case: [a / b for a, b in zip(found, first)] for case, found in seconds.items()}
    return {case: [round(value, 3) for value in quantiles(found, n=4)] for case, found in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    rows = []
    for shape, dtype, precision in CASES:
        row = {"shape": list(shape), "dtype": dtype, "precision": precision}
        rows.append(row | measure(shape, dtype, precision, given.rounds))
        print(json.dumps(rows[-1]), flush=True)
    given.out.write_text(
        json.dumps(
            {"environment": environment("cpu", "both", False), "threads": torch.get_num_threads(), "rows": rows},
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
