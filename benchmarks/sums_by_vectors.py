"""What it gains that noise is added to weights by explicit vectors (metazo/noise/wide_weights.py), and not through a buffer.

The same passes over 1,048,576 weights in two processes, of which one has the loops alone, by turns on one core: nanoseconds
per weight, the least of eight passes, and the ratio of the two, round by round. It says nothing on a processor without
registers of 512 bits.

python benchmarks/sums_by_vectors.py --out benchmarks/sums_by_vectors.json      # one minute
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import torch

from metazo.bench.measurements import environment

WEIGHTS, ROUNDS, REPEATS = 1 << 20, 31, 8
COUNTER = 7, 3, 1  # seed, tensor, purpose


def passes() -> dict[str, Callable[[], None]]:
    """The passes by name; the kernels are imported here, in the process that runs them."""
    from metazo.noise import cpu, cpu_split

    base = torch.randn(WEIGHTS)
    found: dict[str, Callable[[], None]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name, w = str(dtype).removeprefix("torch."), base.to(dtype)
        out = torch.empty_like(w)
        found[f"w += a z, {name}"] = lambda w=w: cpu.add_("gaussian", w, 1e-3, 1.0, *COUNTER, 0)
        if dtype == torch.float32:
            continue
        found[f"w = master + a z, {name}"] = lambda out=out: cpu.place_("gaussian", out, base, 1e-3, *COUNTER, 0)
        for bits in (torch.int16, torch.int8):
            low, kind = torch.zeros(WEIGHTS, dtype=bits), f"{name}, compensated-{torch.iinfo(bits).bits}"
            found[f"probe = w + a z, {kind}"] = lambda out=out, w=w, low=low: cpu_split.place_(
                "gaussian", out, w, low, 1e-3, *COUNTER, 0
            )
            found[f"w += a z, {kind}"] = lambda w=w, low=low: cpu_split.add_(
                "gaussian", w, low, 1e-3, 1.0, *COUNTER, 0, 5
            )
    return found


def serve(asked: Connection, by_vectors: bool, core: int) -> None:
    """Answer the name of a pass with the nanoseconds per weight that it takes."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    from metazo.noise import wide_weights

    wide_weights.WIDE = wide_weights.WIDE and by_vectors
    known = passes()
    while (name := asked.recv()) is not None:
        taken = []
        for _ in range(REPEATS):
            begun = perf_counter()
            known[name]()
            taken.append(perf_counter() - begun)
        asked.send(1e9 * min(taken) / WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    context, asked = multiprocessing.get_context("spawn"), {}
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    with tempfile.TemporaryDirectory() as caches:
        for by_vectors in (True, False):  # each with compiled loops of its own
            os.environ["NUMBA_CACHE_DIR"] = str(Path(caches, str(by_vectors)))
            asked[by_vectors], answer = context.Pipe()
            context.Process(target=serve, args=(answer, by_vectors, core), daemon=True).start()
        rows = {}
        for name in passes():
            taken: dict[bool, list[float]] = {True: [], False: []}
            for number in range(ROUNDS + 1):
                for by_vectors in (True, False) if number % 2 else (False, True):
                    asked[by_vectors].send(name)
                    nanoseconds = asked[by_vectors].recv()
                    if number:  # the first round compiles
                        taken[by_vectors].append(nanoseconds)
            ratios = [own / other for own, other in zip(taken[True], taken[False])]
            rows[name] = {
                "by vectors, ns": round(median(taken[True]), 3),
                "through a buffer, ns": round(median(taken[False]), 3),
                "ratio (quartiles)": [round(value, 3) for value in quantiles(ratios, n=4)],
            }
            print(name, rows[name], flush=True)
        for pipe in asked.values():
            pipe.send(None)
    found = {
        "environment": environment("cpu", "float32", False),
        "threads": 1,
        "rounds": ROUNDS,
        "repeats": REPEATS,
        "rows": rows,
    }
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
